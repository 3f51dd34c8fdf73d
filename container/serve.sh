#!/bin/bash
# `serve run` as a container's first process: `docker stop` sends SIGTERM, and Serve stops cleanly, with its jobs
# requeued, on SIGINT only.
set -u
# Photos are the service's alone. Ray listens on loopback only, and torch's threads sleep while they wait.
umask 077
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 OMP_WAIT_POLICY=PASSIVE
app='' stops=''
# Before there is a process to pass it on to: bash loses a signal that comes between its fork and a later trap.
trap 'stops=1; [ -z "$app" ] || kill -INT "$app"' TERM INT
# What a shell starts in the background ignores SIGINT by default.
env --default-signal=INT serve run "$@" &
app=$!
[ -z "$stops" ] || kill -INT "$app"
# A signal ends `wait`, not the app; and an app that is gone by now has its status still.
while :; do
  wait "$app"
  status=$?
  kill -0 "$app" 2>/dev/null || break
done
exit "$status"
