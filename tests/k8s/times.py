"""How long a node's pods take to stop, by the manifests and by the app's own settings: the table of docs/deploy.md.

`python -m tests.k8s.times` writes it."""

from pathlib import Path

from .iam import DEPLOY, with_table
from .objects import Objects, Pod, deployments, ray_pods
from .render import render
from .rules_ray import DRAIN

OVERLAY = Path("k8s/overlays/l4-spot")


def table(objects: Objects) -> str:
    rows = ["| group | its deployments, and how long they take at most | drain | grace |", "|---|---|---|---|"]
    for pod in ray_pods(objects):
        name, grace = (pod.group or {}).get("groupName", "head"), pod.spec["terminationGracePeriodSeconds"]
        rows.append(f"| `{name}` | {_stopping(objects, pod)} | {pod.env(DRAIN)} s | {grace} s |")
    return "\n".join(rows)


def _stopping(objects: Objects, pod: Pod) -> str:
    if pod.is_head:
        return "none: it outlives its workers, which cannot drain without it"
    if pod.is_spot:
        return "the same, cut short: the lease brings the job back"
    times: dict[str, float] = {}
    for one in deployments(objects):
        if one.fits(pod):
            kind = one.name.partition("-")[0]
            times[kind] = max(times.get(kind, 0), one.shutdown_s)
    return ", ".join(f"{kind} {seconds:g} s" for kind, seconds in times.items())


if __name__ == "__main__":
    DEPLOY.write_text(with_table(DEPLOY.read_text(), "times", table(render(OVERLAY))))
