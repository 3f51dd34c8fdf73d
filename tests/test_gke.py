"""scripts/gke.sh, whose gcloud and kubectl only note what they are asked; Google's side in k8s/gcp; docs/deploy.md."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serve_app.adapters.webhooks import Webhooks
from serve_app.http.auth import ApiKeys
from serve_app.settings import Secrets, WebhookSettings
from tests.absent import GCLOUD, KUBECTL, absent
from tests.k8s import iam, times
from tests.k8s.objects import Object, Objects, of_kind
from tests.k8s.render import FOLDERS, render

pytestmark = pytest.mark.slow

SCRIPT = Path("scripts/gke.sh")
EXAMPLES = ("example-project", "123456789012", "us-central1", "flux-fill-serve:0.1.0", "flux-fill.example.com")
#: What the fake tools answer, by the beginning of what they are asked.
FAKE = """#!/bin/bash
asked="$(basename "$0") $*"
case $asked in
  *\\ describe\\ * | *" get namespace "* | *" get secret "*) looks=1 ;;
esac
printf '%q ' "$(basename "$0")" "$@" >>"$CALLS"; echo >>"$CALLS"
case $asked in
  "kubectl kustomize "*) exec "$KUBECTL" "$@" ;;
  *" --filename=-"*) cat >>"$CALLS.input" ;;
  *format=value\\(registryUri\\)*) echo images.example/acme/flux-fill ;;
  *format=value\\(image_summary.digest\\)*) echo sha256:abc ;;
  *format=value\\(projectNumber\\)*) echo 42 ;;
  *) [[ -z $looks ]] || [[ -n $EXISTING && $asked =~ $EXISTING ]] ;;
esac
"""


@dataclass
class Tools:
    """A copy of the script with its settings, and the tools on its PATH."""

    folder: Path
    #: A pattern of what `describe` and `get` find.
    existing: str = ""
    environment: dict[str, str] = field(default_factory=lambda: {"PROJECT": "acme", "TAG": "t1"})

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "scripts").mkdir()
        (self.folder / "k8s").mkdir()
        shutil.copy(SCRIPT, self.folder / SCRIPT)
        for name in ("gcloud", "kubectl", "sleep"):
            tool = self.folder / "bin" / name
            tool.write_text(FAKE)
            tool.chmod(0o755)

    def run(self, *arguments: str, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        self.calls_file.unlink(missing_ok=True)
        own = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CALLS": str(self.calls_file)}
        own |= {"EXISTING": self.existing, "KUBECTL": shutil.which("kubectl") or "", "HOME": str(self.folder)}
        done = subprocess.run(
            ["bash", str(self.folder / SCRIPT), *arguments],
            env=own | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) is succeeds, done.stdout + done.stderr
        return done

    @property
    def calls_file(self) -> Path:
        return self.folder / "calls"

    @property
    def calls(self) -> list[str]:
        """Every command, but for those that only look."""
        return [
            call for call in self.all_calls if not re.search(r" (describe|get namespace|get secret|kustomize) ", call)
        ]

    @property
    def all_calls(self) -> list[str]:
        return [" ".join(shlex.split(line)) for line in self.quoted_calls]

    @property
    def quoted_calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def input(self) -> str:
        return Path(f"{self.calls_file}.input").read_text()


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def printed(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [" ".join(shlex.split(line[2:])) for line in done.stdout.splitlines() if line.startswith("+ ")]


def order(calls: list[str], *beginnings: str) -> list[int]:
    """Where the first command with each of the beginnings stands; kubectl's context is left out."""
    plain = [re.sub(r" --context=\S+", "", call) for call in calls]
    return [next(i for i, call in enumerate(plain) if call.startswith(one)) for one in beginnings]


# -- create and delete


def test_create_makes_all_of_it_in_order(tools: Tools) -> None:
    tools.run("create")
    places = order(
        tools.calls,
        "gcloud services enable",
        "gcloud iam service-accounts create flux-fill-nodes",
        "gcloud projects add-iam-policy-binding acme --member=serviceAccount:flux-fill-nodes@acme",
        "gcloud compute networks create flux-fill",
        "gcloud compute networks subnets create flux-fill",
        "gcloud compute routers create flux-fill",
        "gcloud compute routers nats create flux-fill",
        "gcloud dns managed-zones create",
        "gcloud dns record-sets create private.googleapis.com.",
        "gcloud container clusters create flux-fill",
        "gcloud container node-pools create l4 ",
        "gcloud container clusters get-credentials flux-fill",
        "kubectl apply --filename=-",
        "kubectl wait configconnector/",
        "kubectl create namespace flux-fill-google",
        "kubectl create namespace kuberay-system",
        "kubectl apply --server-side --kustomize=",
        "kubectl rollout status deployment/kuberay-operator",
    )
    assert places == sorted(places)
    assert "googleServiceAccount: flux-fill-config@acme.iam.gserviceaccount.com" in tools.input


def test_every_command_is_printed(tools: Tools) -> None:
    assert printed(tools.run("create")) == tools.calls


def test_a_dry_run_prints_the_same_and_calls_nothing(tools: Tools) -> None:
    would = printed(tools.run("create", "--dry-run"))
    assert not tools.calls_file.exists()
    assert would == printed(tools.run("create"))


def test_what_exists_is_not_created_again(tools: Tools) -> None:
    tools.existing = "."
    tools.run("create")
    assert [call for call in tools.calls if " create " in call] == []
    # What may be repeated is.
    assert any("add-iam-policy-binding" in call for call in tools.calls)


def test_create_goes_on_where_it_stopped(tools: Tools) -> None:
    tools.existing = "service-accounts|networks|routers describe|dns|clusters describe"
    tools.run("create")
    made = [" ".join(call.split()[:4]) for call in tools.calls if " create " in call and call.startswith("gcloud")]
    assert made == ["gcloud compute routers nats", "gcloud container node-pools create"]


def test_a_spot_pool_is_made_where_it_is_asked_for(tools: Tools) -> None:
    tools.environment |= {"SPOT_NODES": "6"}
    tools.run("create")
    spot = next(call for call in tools.calls if "node-pools create l4-spot " in call)
    assert {"--spot", "--total-max-nodes=6", "--total-min-nodes=0"} <= set(spot.split())
    assert "--node-taints=cloud.google.com/gke-spot=true:NoSchedule" in spot


def test_gpu_nodes_start_at_zero_with_a_driver(tools: Tools) -> None:
    l4 = next(call for call in printed(tools.run("create")) if "node-pools create l4 " in call)
    assert {"--num-nodes=0", "--total-min-nodes=0", "--enable-autoscaling"} <= set(l4.split())
    assert "--accelerator=type=nvidia-l4,count=1,gpu-driver-version=latest" in l4


def made(calls: list[str], verb: str) -> list[str]:
    """What `gcloud GROUP VERB NAME` was about, accounts by their names."""
    found = [re.match(rf"gcloud (.+?) {verb} (\S+)", call) for call in calls]
    return [f"{one[1]} {one[2].partition('@')[0]}" for one in found if one]


def test_delete_undoes_what_create_made(tools: Tools) -> None:
    tools.run("create")
    created = [one for one in made(tools.calls, "create") if "node-pools" not in one]
    granted = made(tools.calls, "add-iam-policy-binding")
    tools.existing = "."
    tools.run("delete")
    deleted = made(tools.calls, "delete")
    assert sorted(created) == sorted(deleted) and len(created) == 10
    # What depends on another one goes first.
    for kind in ("container", "dns", "compute"):
        both = [one for one in created if one.startswith(kind)], [one for one in deleted if one.startswith(kind)]
        assert both[0] == both[1][::-1]
    assert deleted[0] == "container clusters flux-fill"
    assert made(tools.calls, "remove-iam-policy-binding") == [one for one in granted if one.startswith("projects")]
    # gcloud asks before it deletes a cluster.
    assert "--quiet" not in tools.calls[0]


def test_delete_leaves_alone_what_does_not_exist(tools: Tools) -> None:
    tools.run("delete")
    assert tools.calls == []


def test_config_connector_may_grant_what_its_resources_grant_on_the_project_and_no_more() -> None:
    grantable = re.search(r'^GRANTABLE="(.*)"$', SCRIPT.read_text(), re.M)
    assert grantable and iam.on_the_project(iam.rendered()) == set(re.findall(r"'([^']+)'", grantable[1]))


@pytest.mark.parametrize("command", ["create", "delete", "build"])
def test_a_project_must_be_named(tools: Tools, command: str) -> None:
    tools.environment = {"TAG": "t1"}
    assert "set PROJECT" in tools.run(command, succeeds=False).stderr
    assert tools.calls == []


def test_a_role_that_was_never_bound_does_not_stop_a_deletion(tools: Tools) -> None:
    fake = tools.folder / "bin/gcloud"
    refused = "[[ $* == *remove-iam-policy-binding* ]] && exit 1\n"
    fake.write_text(FAKE.replace("\n", f"\n{refused}", 1))
    tools.existing = "iam service-accounts describe"
    done = tools.run("delete")
    assert "it had no such role" in done.stdout
    assert len([call for call in tools.calls if "service-accounts delete" in call]) == 2


def test_settings_come_from_the_file_and_the_environment_goes_first(tools: Tools) -> None:
    (tools.folder / "k8s/cluster.env").write_text("# a comment\nPROJECT=other\nGPU_NODES=7\n")
    done = tools.run("create", "--dry-run")
    assert "--total-max-nodes=7" in done.stdout and "--project=acme" in done.stdout and "other" not in done.stdout


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("create", "--force"), ("render",), ("edit", "a", "b")])
def test_other_commands_are_refused(tools: Tools, arguments: tuple[str, ...]) -> None:
    assert "gke.sh create [--dry-run]" in tools.run(*arguments, succeeds=False).stderr
    assert tools.calls == []


# -- what runs on it


@pytest.fixture
def kubectl() -> None:
    if not shutil.which("kubectl"):
        absent(KUBECTL)


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_every_example_value_is_replaced(tools: Tools, folder: Path) -> None:
    tools.environment |= {"REGION": "europe-west4", "PUBLIC_HOST": "fill.acme.test"}
    text = tools.run("render", str(folder.absolute())).stdout
    assert [example for example in EXAMPLES if example in text] == []
    before = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    for example, value in zip(EXAMPLES, ("acme", "42", "europe-west4", "@sha256:abc", "fill.acme.test"), strict=True):
        assert (example in before) <= (value in text)
    # Nothing is looked up that the folder does not name.
    assert any("projects describe" in call for call in tools.all_calls) == ("123456789012" in before)
    assert any("repositories describe" in call for call in tools.all_calls) == ("flux-fill-serve:0.1.0" in before)


@pytest.mark.usefixtures("kubectl")
def test_a_value_that_is_needed_must_be_given(tools: Tools) -> None:
    push = str(Path("k8s/gcp/push").absolute())
    assert "set PUBLIC_HOST" in tools.run("render", push, succeeds=False).stderr
    tools.environment = {"PUBLIC_HOST": "fill.acme.test"}
    assert "set PROJECT" in tools.run("render", push, succeeds=False).stderr
    assert "set PROJECT" in tools.run("apply", push, succeeds=False).stderr
    assert tools.calls == []


@pytest.mark.usefixtures("kubectl")
def test_googles_side_is_waited_for_and_one_field_is_not_indexed(tools: Tools) -> None:
    tools.run("apply", str(Path("k8s/gcp").absolute()))
    applied, waited, indexed = tools.calls
    assert " apply --filename=" in applied and " wait --for=condition=Ready --filename=" in waited
    (field,) = json.loads(iam.INDEXES.read_text())["fieldOverrides"]
    assert field == {"collectionGroup": "jobs", "fieldPath": "record", "indexes": []}
    wanted = (
        f"indexes fields update {field['fieldPath']} --collection-group={field['collectionGroup']} --disable-indexes"
    )
    assert wanted in indexed


SERVICE = """
kind: RayService
apiVersion: ray.io/v1
metadata: {name: flux-fill}
spec:
  image: flux-fill-serve:0.1.0
  authOptions: {secretName: ray-token}
  password: {secretKeyRef: {name: redis, key: password}}
  envFrom: [{secretRef: {name: flux-fill}}]
"""
JOB = """---
kind: Job
apiVersion: batch/v1
metadata: {name: weights}
spec: {token: {secretKeyRef: {name: hugging-face, key: HF_TOKEN}}}
"""


@pytest.fixture
def service(tools: Tools, kubectl: None) -> Path:
    folder = tools.folder / "service"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text("resources: [service.yaml]\n")
    (folder / "service.yaml").write_text(SERVICE)
    return folder


def test_a_service_has_its_secrets_first_and_is_waited_for(tools: Tools, service: Path) -> None:
    tools.run("apply", str(service))
    secrets, applied, waited = order(
        tools.calls, "kubectl create --filename=-", "kubectl apply ", "kubectl wait rayservice/flux-fill"
    )
    assert secrets < applied < waited
    assert set(re.findall("name: ([a-z-]+)", tools.input)) == {"ray-token", "redis", "flux-fill"}


def test_a_service_with_gated_weights_is_not_applied_without_their_token(tools: Tools, service: Path) -> None:
    (service / "service.yaml").write_text(SERVICE + JOB)
    assert "set HF_TOKEN" in tools.run("apply", str(service), succeeds=False).stderr
    assert not any(" apply " in call for call in tools.calls)
    assert "hugging-face" not in tools.input
    tools.environment |= {"HF_TOKEN": "hf_secret"}
    tools.run("apply", str(service))
    assert "HF_TOKEN: hf_secret" in tools.input


def test_weights_are_waited_for_before_their_job_is_removed_and_their_failure_is_told(
    tools: Tools, service: Path
) -> None:
    (service / "service.yaml").write_text(SERVICE + JOB)
    tools.existing = "get secret"
    tools.run("apply", str(service))
    job, ready = order(tools.calls, "kubectl wait job/weights", "kubectl wait rayservice/flux-fill")
    assert job < ready
    (tools.folder / "bin/kubectl").write_text(
        FAKE.replace("case $asked", "[[ $asked == *=Complete* ]] && exit 1; case $asked", 1)
    )
    assert "logs job/weights" in tools.run("apply", str(service), succeeds=False).stderr


def test_the_cluster_is_always_named(tools: Tools, service: Path) -> None:
    for command in ("apply", "remove"):
        tools.run(command, str(service))
        asked = [call for call in tools.all_calls if call.startswith("kubectl") and " kustomize " not in call]
        assert asked and all("--context=gke_acme_us-central1-a_flux-fill" in call for call in asked)
    tools.environment |= {"CONTEXT": "kind-flux-fill", "IMAGE": "flux-fill-serve:0.1.0"}
    tools.run("apply", str(service))
    assert not any("gke_" in call or call.startswith("gcloud") for call in tools.all_calls)


def test_secrets_are_random_and_on_no_command_line(tools: Tools) -> None:
    tools.environment |= {"HF_TOKEN": "hf_secret"}
    done = tools.run("secrets")
    values = re.findall(r"(auth_token|password|API_KEYS|WEBHOOK_SECRET|HF_TOKEN): (\S+)", tools.input)
    assert [name for name, _ in values] == ["auth_token", "password", "API_KEYS", "WEBHOOK_SECRET", "HF_TOKEN"]
    assert len({value for _, value in values}) == 5 and all(len(value) >= 40 for _, value in values[:4])
    assert not any(value in done.stdout + "".join(tools.all_calls) for _, value in values)


def test_the_app_takes_the_secrets_that_are_made(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.run("secrets", "flux-fill")
    for name, value in re.findall(r"(API_KEYS|WEBHOOK_SECRET): (\S+)", tools.input):
        monkeypatch.setenv(name, value)
    secrets = Secrets.from_environment()
    assert secrets.webhook_secret and secrets.api_keys
    Webhooks(WebhookSettings(hosts=("example.org",)), secrets)
    key, _, scopes = secrets.api_keys.get_secret_value().partition(":")
    keys = ApiKeys(secrets.api_keys, is_production=True)
    assert scopes.split("+") == ["jobs", "audit"] and keys.client(None, key)[1].issuperset({"jobs", "audit"})


def test_secrets_that_exist_stay(tools: Tools) -> None:
    tools.existing = "get secret (ray-token|flux-fill)"
    tools.run("secrets", "ray-token", "redis", "flux-fill")
    assert re.findall("name: ([a-z-]+)", tools.input) == ["redis"]


def test_an_image_is_built_once(tools: Tools) -> None:
    tools.run("build")
    (submitted,) = tools.calls
    assert submitted.startswith("gcloud builds submit ")
    assert "--substitutions=_IMAGE=images.example/acme/flux-fill/flux-fill-serve:t1,_REVISION=t1" in submitted
    assert "--gcs-source-staging-dir=gs://acme-build/" in submitted
    tools.existing = "docker images describe"
    tools.run("build")
    assert tools.calls == []


def test_an_image_is_built_of_what_its_commit_has(tools: Tools) -> None:
    del tools.environment["TAG"]
    git = ["git", "-C", str(tools.folder), "-c", "user.name=a", "-c", "user.email=a@b.test"]
    (tools.folder / "Dockerfile").write_text("FROM scratch\n")
    for arguments in (["init", "-q"], ["add", "Dockerfile"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    tools.run("build")
    assert len(tools.calls) == 1
    (tools.folder / "Dockerfile").write_text("FROM scratch\nUSER 1\n")
    assert "M Dockerfile" in tools.run("build", succeeds=False).stderr
    assert tools.calls == []


def test_the_images_tag_changes_with_all_that_goes_into_it() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", Path("Dockerfile").read_text(), re.M)
    sources = re.search(r"^SOURCES=\((.*?)\)$", SCRIPT.read_text(), re.M | re.S)
    assert sources
    assert {".dockerignore", "Dockerfile", *" ".join(copied).split()} == set(sources[1].split())


def test_an_image_that_was_not_built_is_not_applied(tools: Tools, service: Path) -> None:
    fake = tools.folder / "bin/gcloud"
    fake.write_text(FAKE.replace("echo sha256:abc", "exit 1"))
    said = tools.run("apply", str(service), succeeds=False).stderr
    assert "there is no image images.example/acme/flux-fill/flux-fill-serve:t1: build it" in said
    assert tools.calls == []


@pytest.mark.usefixtures("kubectl")
def test_a_removal_needs_no_image_and_no_host(tools: Tools, service: Path) -> None:
    for folder in (service, Path("k8s/gcp/push").absolute()):
        tools.run("remove", str(folder))
        assert not any("docker images" in call for call in tools.all_calls)
        assert " delete --ignore-not-found --filename=" in tools.calls[-1]
        # The service goes before the namespace does.
        assert any("delete rayservice flux-fill" in call for call in tools.calls[:-1]) == (folder == service)


def test_an_edit_is_published_when_its_files_are_there(tools: Tools) -> None:
    tools.existing = "storage objects describe"
    tools.run("edit", "cat.jpg", "mask.png", "edited.jpg")
    kinds = [call.split()[1:3] for call in tools.calls]
    assert kinds == [["storage", "cp"], ["storage", "cp"], ["pubsub", "topics"], ["storage", "cp"]]
    (session,) = {session for call in tools.calls for session in re.findall(r"first-\d+", call)}
    assert f"gs://acme-photos/users/gke/sessions/{session}/original.jpg" in tools.calls[0]
    assert json.loads(tools.calls[2].partition("--message=")[2]) == {"userId": "gke", "sessionId": session}
    assert tools.calls[3].endswith(f"{session}/edited.jpg edited.jpg")


def test_a_restart_changes_the_pods_and_nothing_else(tools: Tools) -> None:
    tools.run("restart")
    (call,) = tools.calls
    patch = json.loads(call.partition("--patch=")[2])
    template = patch["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert template.keys() == {"metadata"} and template["metadata"].keys() == {"annotations"}


# -- Google's side


@pytest.fixture
def google() -> Objects:
    return iam.rendered()


def test_googles_side_breaks_no_rule(google: Objects) -> None:
    assert iam.broken(google) == {}


Fault = Callable[[Objects], None]


def one(objects: Objects, kind: str, name: str) -> Object:
    return next(each for each in of_kind(objects, kind) if each["metadata"]["name"].endswith(name))


def binding(objects: Objects, name: str) -> Object:
    return one(objects, "IAMPolicyMember", name)["spec"]


def planted() -> Iterator[tuple[str, str, Fault]]:
    """The rule that is to notice, a part of its sentence, and the fault."""

    def subscription(change: Callable[[Object], None]) -> Fault:
        return lambda objects: change(one(objects, "PubSubSubscription", "session-processing")["spec"])

    def bucket(change: Callable[[Object], None]) -> Fault:
        return lambda objects: change(one(objects, "StorageBucket", "-photos")["spec"])

    def role(name: str, to: str) -> Fault:
        return lambda objects: binding(objects, name).update(role=to)

    pulled, narrow = "sessions_are_pulled_as_the_app_defers", "roles_are_narrow"
    yield pulled, "enableExactlyOnceDelivery", subscription(lambda spec: spec.pop("enableExactlyOnceDelivery"))
    moved = {"deadLetterTopicRef": {"name": "session-processing-dead"}, "maxDeliveryAttempts": 100}
    yield pulled, "deadLetterPolicy", subscription(lambda spec: spec.update(deadLetterPolicy=moved))
    yield pulled, "600s", subscription(lambda spec: spec.pop("retryPolicy"))
    yield narrow, "editor", role("-reads-photos", "roles/editor")
    yield narrow, "owner", role("-keeps-jobs", "roles/owner")
    yield narrow, "storage.admin", role("-writes-results", "roles/storage.admin")
    yield narrow, "allUsers", lambda objects: binding(objects, "-reads-photos").update(member="allUsers")
    yield "buckets_are_closed", "publicAccess", bucket(lambda spec: spec.update(publicAccessPrevention="inherited"))
    yield "buckets_are_closed", "uniform", bucket(lambda spec: spec.pop("uniformBucketLevelAccess"))
    yield (
        "bindings_say_why",
        "-pulls-sessions",
        lambda objects: one(objects, "IAMPolicyMember", "-pulls-sessions")["metadata"]["annotations"].pop(
            "fluxfill/why"
        ),
    )
    index = "indexes_are_the_apps"
    yield index, "receiver", lambda objects: objects.remove(one(objects, "FirestoreIndex", "-receiver-webhook"))
    yield (
        index,
        "does not have",
        lambda objects: one(objects, "FirestoreIndex", "-type-created")["spec"].update(queryScope="COLLECTION_GROUP"),
    )
    yield "originals_are_not_written", "condition", lambda objects: binding(objects, "-writes-results").pop("condition")
    yield (
        "originals_are_not_written",
        "condition",
        lambda objects: binding(objects, "-writes-its-folders").update(
            condition={"title": "x", "expression": 'resource.name.startsWith("projects/_/buckets/b/objects/users/")'}
        ),
    )
    weights = "weights_are_written_by_their_job_alone"
    yield weights, "flux-fill@", role("-reads-weights", "roles/storage.objectUser")
    yield (
        "jobs_roles_name_their_database",
        "condition",
        lambda objects: binding(objects, "-keeps-jobs").pop("condition"),
    )
    signs = "accounts_sign_for_themselves_alone"
    yield (
        signs,
        "another account",
        lambda objects: binding(objects, "-signs-links").update(
            member="serviceAccount:flux-fill-build@example-project.iam.gserviceaccount.com"
        ),
    )
    yield (
        "pushes_are_signed",
        "verify",
        lambda objects: one(objects, "PubSubSubscription", "-push")["spec"]["pushConfig"].pop("oidcToken"),
    )
    stays = "users_data_outlives_its_resource"
    yield stays, "-photos", lambda objects: one(objects, "StorageBucket", "-photos")["metadata"].pop("annotations")
    yield stays, "Firestore", lambda objects: one(objects, "FirestoreDatabase", "")["metadata"].pop("annotations")


PLANTED = list(planted())


@pytest.mark.parametrize(("rule", "says", "fault"), PLANTED, ids=[f"{rule}-{says}" for rule, says, _ in PLANTED])
def test_a_planted_fault_is_named(google: Objects, rule: str, says: str, fault: Fault) -> None:
    fault(google)
    found = iam.broken(google)
    assert found.keys() == {rule}
    assert any(says in sentence for sentence in found[rule])


def test_each_rule_has_a_fault() -> None:
    assert {rule for rule, _, _ in PLANTED} == {rule.__name__ for rule in iam.RULES}


# -- the document


DOCUMENT = iam.DEPLOY.read_text()
BLOCKS = re.findall(r"```\n(.*?)```", DOCUMENT, re.S)


def test_the_table_of_bindings_is_that_of_the_resources(google: Objects) -> None:
    assert iam.with_table(DOCUMENT, "iam", iam.table(google)) == DOCUMENT, "run python -m tests.k8s.iam"


def test_the_table_of_times_is_that_of_the_manifests_and_the_settings() -> None:
    table = times.table(render(times.OVERLAY))
    assert "| `cpu` | Ingress 95 s, TextEncoder 120 s |" in table
    assert iam.with_table(DOCUMENT, "times", table) == DOCUMENT, "run python -m tests.k8s.times"


def test_every_command_of_the_script_is_documented_and_exists() -> None:
    usage = set(re.findall(r"^#   gke\.sh ([a-z]+)", SCRIPT.read_text(), re.M))
    named = set(re.findall(r"scripts/gke\.sh ([a-z]+)", DOCUMENT))
    for file in Path("k8s").rglob("*.yaml"):
        named |= set(re.findall(r"`scripts/gke\.sh ([a-z]+)", file.read_text()))
    assert len(usage) == 9
    assert usage == named


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize("key", ["API_KEYS", "WEBHOOK_SECRET"])
def test_a_secrets_replacement_is_a_patch_that_keeps_the_old_value(tmp_path: Path, key: str) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: flux-fill}\n")
    (command,) = re.findall(rf"^kubectl -n flux-fill patch secret flux-fill (.*{key}: .*)$", DOCUMENT, re.M)
    patch = f"old=OLD; kubectl patch --local --filename={secret} --output=json {command}"
    done = subprocess.run(["bash", "-c", patch], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\S{40,}[ ,]OLD", json.loads(done.stdout)["stringData"][key])


def test_there_are_five_steps_each_with_what_to_see_and_its_undo() -> None:
    steps = re.split(r"^### \d\. ", DOCUMENT, flags=re.M)[1:]
    assert len(steps) == 5
    for step in steps:
        step = step.partition("\n## ")[0]
        assert re.findall(r"scripts/gke\.sh ([a-z]+)", step.split("```")[1])
        assert "\n*You see*" in step and "\n*Undo:* " in step


def test_every_folder_in_the_document_is_there() -> None:
    folders = set(re.findall(r"\b(?:k8s|scripts)/[a-z0-9/_.-]*[a-z0-9]", DOCUMENT)) - {"k8s/cluster.env"}
    assert len(folders) > 10
    assert [folder for folder in sorted(folders) if not Path(folder).exists()] == []


def test_the_document_and_the_example_name_the_settings_that_the_script_reads() -> None:
    read = set(re.findall(r"\b([A-Z][A-Z_]+):=", SCRIPT.read_text())) | {"TAG"}
    example = set(re.findall(r"^#?([A-Z_]+)=", Path("k8s/cluster.env.example").read_text(), re.M))
    assert example <= read
    assert read - example == {"CONTEXT"}
    defaults = dict(re.findall(r"\b([A-Z_]+):=([^}$]+)\}", SCRIPT.read_text()))
    assert dict(re.findall(r"^#([A-Z_]+)=(.+)$", Path("k8s/cluster.env.example").read_text(), re.M)).items() >= {
        (name, value) for name, value in defaults.items() if name in example
    }


def commands(tools: Tools) -> Iterator[str]:
    """Every gcloud command: the script's, as it prints them, and the document's."""
    tools.environment |= {"SPOT_NODES": "1"}
    for arguments in (
        ("create",),
        ("build",),
        ("edit", "a.jpg", "b.png", "c.jpg"),
        ("apply", str(Path("k8s/gcp").absolute())),
    ):
        tools.existing = "storage objects describe"
        tools.run(*arguments)
        yield from tools.quoted_calls
    tools.existing = "."
    tools.run("delete")
    yield from tools.quoted_calls
    for block in BLOCKS:
        yield from re.findall(r"^ *(gcloud .*)$", block.replace("\\\n", " "), re.M)


@pytest.mark.usefixtures("kubectl")
def test_gcloud_knows_every_command_and_option(tools: Tools, tmp_path: Path) -> None:
    """Its own linter reads the arguments as gcloud itself would, and asks nobody."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        absent(GCLOUD)
    asked = sorted({one.strip() for one in commands(tools) if one.startswith("gcloud ")})
    file = tmp_path / "commands"
    file.write_text("```\n" + "\n".join(asked) + "\n```\n")
    done = subprocess.run(
        [gcloud, "meta", "lint-gcloud-commands", f"--commands-text-file={file}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "config"), "HOME": str(tmp_path)},
    )
    found = json.loads(done.stdout)
    assert len(found) == len(asked) > 40
    assert [(one["command_string"], one["error_message"]) for one in found if not one["success"]] == []
