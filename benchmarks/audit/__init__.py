"""The audit: a Ray job that paints a session with every cell of a matrix on the running app's own replicas.

It knows the app by its settings, its stores and its deployments' handles; it starts no replica by itself.
"""
