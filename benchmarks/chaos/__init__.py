"""Does the service lose a session, or do one twice, while its processes are killed and its stores are cut off?

    python -m benchmarks.chaos [--sessions 500] [--broker embedded|google] [--logs FOLDER] [--out FILE]

The whole app runs on this machine as in production but for its size: two ingress replicas and several of `telea`, jobs
in PostgreSQL, blobs in S3 (moto's server with versions kept), and a Pub/Sub server in a process of its own. While
sessions are published, a random replica gets SIGKILL about as often as one starts, which is measured first, and the
stores refuse connections. Some sessions are published twice and some are poisoned, each in one of ten ways.

At the end each good session must be completed with its own picture, each poisoned one failed and in the dead-letter
topic with its reason, no job left running, and no session's result stored with different bytes by different attempts.
Exits with 1 where that is not so. Prints a table and, last, a JSON object.

    servers ── proxies, which are cut ── app, whose replicas are killed
    sessions.py ── publishing.py ─► Pub/Sub ─► app ─► stores, dead-letter topic ─► records.py ─► verdict.py

With Google's emulator no ingress is killed.
"""
