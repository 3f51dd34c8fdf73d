"""Rules for Google's side: k8s/gcp."""

import re
from collections.abc import Iterator

from .objects import FUSE, Object, Objects, at, namespace, of_kind, pods, settings

#: Deferred messages are nacked, and each delivery counts.
FEWEST_DELIVERIES = 10


def dead_letters_have_the_agents_roles(objects: Objects) -> Iterator[str]:
    """Pub/Sub's own agent publishes to the dead-letter topic and acknowledges on the subscription; without the two
    roles nothing is ever dead-lettered."""
    granted = _agents_roles(objects)
    for one in of_kind(objects, "PubSubSubscription"):
        policy = one["spec"].get("deadLetterPolicy")
        if policy is None:
            continue
        topic = policy["deadLetterTopicRef"]["name"]
        if ("PubSubTopic", topic, "roles/pubsub.publisher") not in granted:
            yield f"{at(one)}: deadLetterPolicy: Pub/Sub's agent lacks roles/pubsub.publisher on {topic}"
        if ("PubSubSubscription", one["metadata"]["name"], "roles/pubsub.subscriber") not in granted:
            yield f"{at(one)}: deadLetterPolicy: Pub/Sub's agent lacks roles/pubsub.subscriber on it"
        if policy.get("maxDeliveryAttempts", 5) < FEWEST_DELIVERIES:
            yield f"{at(one)}: deadLetterPolicy.maxDeliveryAttempts: fewer than {FEWEST_DELIVERIES}"


def _agents_roles(objects: Objects) -> set[tuple[str, str, str]]:
    agent = re.compile(r"serviceAccount:service-\d+@gcp-sa-pubsub\.iam\.gserviceaccount\.com")
    found = set()
    for kind, name, role, member in _grants(objects):
        if agent.fullmatch(member):
            found.add((kind, name, role))
    return found


def _grants(objects: Objects) -> Iterator[tuple[str, str, str, str]]:
    """Kind and name of the resource, role, member."""
    for one in of_kind(objects, "IAMPolicyMember", "IAMPartialPolicy"):
        spec = one["spec"]
        target = spec["resourceRef"]["kind"], spec["resourceRef"].get("name") or spec["resourceRef"].get("external", "")
        if one["kind"] == "IAMPolicyMember":
            yield *target, spec["role"], spec.get("member", "")
        for binding in spec.get("bindings") or ():
            for member in binding.get("members") or ():
                yield *target, binding["role"], member.get("member", "")


def subscriptions_never_expire(objects: Objects) -> Iterator[str]:
    """By default one that is not pulled for 31 days is deleted, with its messages."""
    for one in of_kind(objects, "PubSubSubscription"):
        if (one["spec"].get("expirationPolicy") or {}).get("ttl") != "":
            yield f'{at(one)}: expirationPolicy.ttl: is not "": it is deleted when nobody pulls for a month'


def resources_point_at_each_other(objects: Objects) -> Iterator[str]:
    """Each reference by name among the resources."""
    names = {one["metadata"]["name"] for one in objects}

    def missing(part: object, place: str) -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                if key.endswith("Ref") and isinstance(value, dict) and "name" in value and value["name"] not in names:
                    yield f"{place}.{key}: {value['name']} is defined nowhere"
                yield from missing(value, f"{place}.{key}")
        elif isinstance(part, list):
            for value in part:
                yield from missing(value, place)

    for one in objects:
        if one["apiVersion"].partition("/")[0].endswith("cnrm.cloud.google.com"):
            yield from missing(one["spec"], f"{at(one)}: spec")


def the_app_finds_what_it_names(objects: Objects) -> Iterator[str]:
    """Topics, subscriptions and the bucket of a RayService's settings are among Google's resources."""
    if not of_kind(objects, "RayService"):
        return
    own = settings(objects)
    messages = own.messages
    topics = {messages.topic, messages.dead_letter_topic, messages.completion_topic} - {None}
    wanted = {"PubSubTopic": topics, "PubSubSubscription": {*messages.subscriptions, messages.dead_letter_subscription}}
    if own.blobs.startswith("firebase:"):
        wanted["StorageBucket"] = {own.blobs.removeprefix("firebase:")}
    for kind, names in wanted.items() if messages.is_google else ():
        for name in sorted(names - {_resource(one) for one in of_kind(objects, kind)}):
            yield f"serveConfigV2: messages: {kind} {name} is not among Google's resources"


def accounts_are_bound_at_google(objects: Objects) -> Iterator[str]:
    """An annotation alone is a wish: the account at Google must exist, and let the pods' account act as it."""
    granted = set(_grants(objects))
    emails = {one["metadata"]["name"] for one in of_kind(objects, "IAMServiceAccount")}
    for one in of_kind(objects, "ServiceAccount"):
        email = (one["metadata"].get("annotations") or {}).get("iam.gke.io/gcp-service-account")
        if email is None:
            continue
        name, _, project = email.removesuffix(".iam.gserviceaccount.com").partition("@")
        member = f"serviceAccount:{project}.svc.id.goog[{namespace(one)}/{one['metadata']['name']}]"
        if name not in emails:
            yield f"{at(one)}: iam.gke.io/gcp-service-account: IAMServiceAccount {name} is defined nowhere"
        elif ("IAMServiceAccount", name, "roles/iam.workloadIdentityUser", member) not in granted:
            yield f"{at(one)}: iam.gke.io/gcp-service-account: {member} lacks roles/iam.workloadIdentityUser on {name}"


def buckets_open_to_who_mounts_them(objects: Objects) -> Iterator[str]:
    """Roles of the pods' account at Google, on the bucket: to read, or to write where the volume is not read-only."""
    granted = set(_grants(objects))
    accounts = {
        one["metadata"]["name"]: one["metadata"].get("annotations") or {} for one in of_kind(objects, "ServiceAccount")
    }
    for pod in pods(objects):
        email = accounts.get(pod.spec.get("serviceAccountName", ""), {}).get("iam.gke.io/gcp-service-account")
        for volume in pod.volumes:
            csi = volume.get("csi") or {}
            if email is None or csi.get("driver") != FUSE:
                continue
            bucket = csi["volumeAttributes"]["bucketName"]
            roles = ("objectViewer", "objectUser", "objectAdmin")[0 if csi.get("readOnly") else 1 :]
            having = {role for role in roles if (*_grant(bucket, role), f"serviceAccount:{email}") in granted}
            if not having:
                yield f"{pod.at}: volume {volume['name']}: {email} has no roles/storage.{roles[0]} on {bucket}"


def _grant(bucket: str, role: str) -> tuple[str, str, str]:
    return "StorageBucket", bucket, f"roles/storage.{role}"


def _resource(one: Object) -> str:
    return one["spec"].get("resourceID", one["metadata"]["name"])
