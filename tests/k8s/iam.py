"""Google's side: who may do what, as the table of docs/deploy.md has it, and rules for k8s/gcp that schemas miss.

`python -m tests.k8s.iam` writes the table."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .objects import Object, Objects, at, of_kind
from .render import render

FOLDERS = (Path("k8s/gcp"), Path("k8s/gcp/push"))
DEPLOY = Path("docs/deploy.md")
INDEXES = Path("k8s/firestore.indexes.json")

#: The roles that may be granted, by the kind of what they are granted on. All others are too broad, or need a reason.
ROLES = {
    "PubSubTopic": {"pubsub.publisher"},
    "PubSubSubscription": {"pubsub.subscriber", "pubsub.viewer"},
    "StorageBucket": {"storage.objectViewer", "storage.objectUser"},
    "ArtifactRegistryRepository": {"artifactregistry.reader", "artifactregistry.writer"},
    "IAMServiceAccount": {
        "iam.workloadIdentityUser",
        "iam.serviceAccountTokenCreator",
        "iam.serviceAccountOpenIdTokenCreator",
        "iam.serviceAccountUser",
    },
    "Project": {"datastore.user", "logging.logWriter", "monitoring.viewer", "ondemandscanning.admin"},
}
#: The longest backoff that Pub/Sub may add to the app's own, in seconds.
MOST_BACKOFF_S = 10
#: Who writes weights runs code in the replicas.
WEIGHTS = "flux-fill-weights"


def rendered() -> Objects:
    return [one for folder in FOLDERS for one in render(folder)]


def bindings(objects: Objects) -> Objects:
    return of_kind(objects, "IAMPolicyMember")


# -- the table


def table(objects: Objects) -> str:
    """Every binding: who, role, on what, under which condition, and why."""
    rows = sorted((_who(one), _on(one), _role(one), _condition(one), _why(one)) for one in bindings(objects))
    lines = [f"| {who} | `{role}` | {on} | {condition} | {why} |" for who, on, role, condition, why in rows]
    return "\n".join(["| who | role | on | only where | why |", "|---|---|---|---|---|", *lines])


def with_table(text: str, name: str, new: str) -> str:
    """The document with one of its tables made anew."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def on_the_project(objects: Objects) -> set[str]:
    """The roles that are granted on the project."""
    return {one["spec"]["role"] for one in bindings(objects) if one["spec"]["resourceRef"]["kind"] == "Project"}


def _who(one: Object) -> str:
    member = one["spec"]["member"].removeprefix("serviceAccount:")
    if pods := re.fullmatch(r".+\.svc\.id\.goog\[(.+)]", member):
        return f"pods of `{pods[1]}`"
    return "Pub/Sub's own agent" if "@gcp-sa-pubsub." in member else f"`{member.partition('@')[0]}`"


def _on(one: Object) -> str:
    target = one["spec"]["resourceRef"]
    kinds = {
        "PubSubTopic": "topic",
        "PubSubSubscription": "subscription",
        "StorageBucket": "bucket",
        "ArtifactRegistryRepository": "image repository",
        "IAMServiceAccount": "account",
    }
    return "the project" if target["kind"] == "Project" else f"{kinds[target['kind']]} `{target['name']}`"


def _role(one: Object) -> str:
    return str(one["spec"]["role"]).removeprefix("roles/")


def _condition(one: Object) -> str:
    """Without what is the same in each of them, and without bars, which would end a cell."""
    if "condition" not in one["spec"]:
        return ""
    words = re.sub(r"projects/_/buckets/[^/]+/objects/", "", " ".join(one["spec"]["condition"]["expression"].split()))
    return f"`{words.replace('resource.name', 'name').replace('||', 'or').replace('&&', 'and')}`"


def _why(one: Object) -> str:
    return str((one["metadata"].get("annotations") or {}).get("fluxfill/why", "")).strip()


# -- rules: each yields a sentence for what breaks it


def bindings_say_why(objects: Objects) -> Iterator[str]:
    yield from (f"{at(one)}: fluxfill/why: no reason is given" for one in bindings(objects) if not _why(one))


def roles_are_narrow(objects: Objects) -> Iterator[str]:
    for one in bindings(objects):
        kind = one["spec"]["resourceRef"]["kind"]
        if _role(one) not in ROLES.get(kind, set()):
            yield f"{at(one)}: role: {_role(one)} is not one that is granted on a {kind}"
        if not one["spec"]["member"].startswith("serviceAccount:"):
            yield f"{at(one)}: member: {one['spec']['member']} is not a service account"


def accounts_sign_for_themselves_alone(objects: Objects) -> Iterator[str]:
    """The role makes tokens of the account, which is to be it."""
    for one in bindings(objects):
        if _role(one) == "iam.serviceAccountTokenCreator" and _who(one) != f"`{one['spec']['resourceRef']['name']}`":
            yield f"{at(one)}: member: {one['spec']['member']} becomes another account"


def jobs_roles_name_their_database(objects: Objects) -> Iterator[str]:
    for one in bindings(objects):
        if _role(one) == "datastore.user" and "/databases/" not in _condition(one):
            yield f"{at(one)}: condition: without one the role is good for every database of the project"


def weights_are_written_by_their_job_alone(objects: Objects) -> Iterator[str]:
    for one in bindings(objects):
        target = one["spec"]["resourceRef"].get("name", "")
        if target.endswith("-weights") and _role(one) == "storage.objectUser" and _who(one) != f"`{WEIGHTS}`":
            yield f"{at(one)}: member: {one['spec']['member']} could run code in the replicas"


def originals_are_not_written(objects: Objects) -> Iterator[str]:
    for one in bindings(objects):
        target = one["spec"]["resourceRef"].get("name", "")
        if target.endswith("-photos") and _role(one) == "storage.objectUser":
            # Sessions of the user `api` are the app's own: it stores what was posted.
            where = _condition(one).replace('"users/api/"', "")
            if not where or ('"users/' in where and '.endsWith("/edited.jpg")' not in where):
                yield f"{at(one)}: condition: users' originals and masks can be written over"


def buckets_are_closed(objects: Objects) -> Iterator[str]:
    for one in of_kind(objects, "StorageBucket"):
        if one["spec"].get("publicAccessPrevention") != "enforced":
            yield f"{at(one)}: publicAccessPrevention: is not enforced"
        if one["spec"].get("uniformBucketLevelAccess") is not True:
            yield f"{at(one)}: uniformBucketLevelAccess: is off, so that single objects may have other rules"


def sessions_are_pulled_as_the_app_defers(objects: Objects) -> Iterator[str]:
    """The app defers by the ack deadline: each deferral is a delivery to Pub/Sub, and the end of a deadline."""
    for one in of_kind(objects, "PubSubSubscription"):
        spec = one["spec"]
        if spec["topicRef"].get("name") != "session-processing" or "pushConfig" in spec:
            continue
        if spec.get("enableExactlyOnceDelivery") is not True:
            yield f"{at(one)}: enableExactlyOnceDelivery: is off"
        if "deadLetterPolicy" in spec:
            yield f"{at(one)}: deadLetterPolicy: messages that only wait would be moved away"
        backoff = spec.get("retryPolicy", {}).get("maximumBackoff", "600s")
        if float(backoff.removesuffix("s")) > MOST_BACKOFF_S:
            yield f"{at(one)}: retryPolicy.maximumBackoff: {backoff} comes on top of the app's own backoff"


def pushes_are_signed(objects: Objects) -> Iterator[str]:
    for one in of_kind(objects, "PubSubSubscription"):
        push = one["spec"].get("pushConfig")
        if push and not (push.get("oidcToken", {}).get("audience") and push["pushEndpoint"].startswith("https://")):
            yield f"{at(one)}: pushConfig: the app cannot verify who calls"


def users_data_outlives_its_resource(objects: Objects) -> Iterator[str]:
    for one in objects:
        is_users = one["kind"] == "FirestoreDatabase" or re.fullmatch(r"StorageBucket/.+-photos", at(one))
        policy = (one["metadata"].get("annotations") or {}).get("cnrm.cloud.google.com/deletion-policy")
        if is_users and policy != "abandon":
            yield f"{at(one)}: cnrm.cloud.google.com/deletion-policy: is not abandon"


def indexes_are_the_apps(objects: Objects) -> Iterator[str]:
    """Those of k8s/firestore.indexes.json, which `firebase deploy` and the emulator read."""
    made = {
        (one["spec"]["collection"], one["spec"]["queryScope"], _fields(one["spec"]))
        for one in of_kind(objects, "FirestoreIndex")
    }
    asked = {
        (one["collectionGroup"], one["queryScope"], _fields(one)) for one in json.loads(INDEXES.read_text())["indexes"]
    }
    yield from (f"{INDEXES}: no FirestoreIndex is {one}" for one in sorted(asked - made))
    yield from (f"FirestoreIndex: {INDEXES} does not have {one}" for one in sorted(made - asked))


def _fields(index: Object) -> tuple[tuple[str, str], ...]:
    return tuple((field["fieldPath"], field["order"]) for field in index["fields"])


RULES: tuple[Callable[[Objects], Iterator[str]], ...] = (
    bindings_say_why,
    roles_are_narrow,
    accounts_sign_for_themselves_alone,
    jobs_roles_name_their_database,
    weights_are_written_by_their_job_alone,
    originals_are_not_written,
    buckets_are_closed,
    sessions_are_pulled_as_the_app_defers,
    pushes_are_signed,
    users_data_outlives_its_resource,
    indexes_are_the_apps,
)


def broken(objects: Objects) -> dict[str, list[str]]:
    """The rules that the objects break, by name, each with its sentences."""
    return {rule.__name__: what for rule in RULES if (what := list(rule(objects)))}


if __name__ == "__main__":
    DEPLOY.write_text(with_table(DEPLOY.read_text(), "iam", table(rendered())))
