#!/bin/bash
# `serve run` as a container's first process: `docker stop` sends SIGTERM, and Serve stops cleanly, with its jobs
# requeued, on SIGINT only.
set -u
# Photos are the service's alone. Ray listens on loopback only, and torch's threads sleep while they wait.
umask 077
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 OMP_WAIT_POLICY=PASSIVE
# What a shell starts in the background ignores SIGINT by default.
env --default-signal=INT serve run "$@" &
app=$!
trap 'kill -INT "$app"' TERM INT
status=0
# A signal ends `wait`, not the app.
while kill -0 "$app" 2>/dev/null; do
  wait "$app"
  status=$?
done
exit "$status"
