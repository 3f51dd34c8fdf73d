#!/usr/bin/env bash
# From an empty Google project to a service on GKE, and back; docs/deploy.md goes through it. Commands are printed before
# they run.
#
#   gke.sh create [--dry-run]         a network, a cluster with its node pools, Config Connector, KubeRay; what exists stays
#   gke.sh delete [--dry-run]         all of that
#   gke.sh render DIR                 prints what `kubectl kustomize DIR` makes, with your values in place of the examples
#   gke.sh apply DIR                  applies it, and waits until it is ready
#   gke.sh remove DIR                 deletes it
#   gke.sh build                      builds the image with Cloud Build and pushes it, unless this TAG exists
#   gke.sh secrets [NAME...]          makes the secrets that do not exist yet, with random values
#   gke.sh restart                    starts a second Ray cluster, which reads the secrets anew and replaces the first
#   gke.sh edit PHOTO MASK RESULT     has one photo edited, asking as an API would
#
# Settings come from the environment, else from k8s/cluster.env: see k8s/cluster.env.example.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -f $root/k8s/cluster.env ]]; then
  while IFS='=' read -r name value; do
    if [[ $name =~ ^[A-Z_]+$ && -z ${!name+set} ]]; then printf -v "$name" %s "$value"; fi
  done <"$root/k8s/cluster.env"
fi
: "${PROJECT:=}" "${REGION:=us-central1}" "${CLUSTER:=flux-fill}" "${PUBLIC_HOST:=}"
: "${LOCATION:=$REGION-a}" "${CPU_MACHINE:=e2-standard-8}" "${CPU_NODES:=6}" "${GPU_NODES:=8}" "${SPOT_NODES:=0}"
: "${CONTEXT:=gke_${PROJECT}_${LOCATION}_${CLUSTER}}"
dry_run=

die() { echo "gke.sh: $*" >&2 && exit 1; }

need_project() { [[ -n $PROJECT ]] || die "set PROJECT, in the environment or in k8s/cluster.env"; }

# Prints a command, and runs it unless this is a dry run.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $dry_run ]] || "$@"
}

# Whether the command succeeds; in a dry run nothing exists.
exists() { [[ -z $dry_run ]] && "$@" >/dev/null 2>&1; }

# Never the cluster that kubectl happens to point at.
on_cluster() { kubectl --context="$CONTEXT" "$@"; }
run_on_cluster() { run kubectl --context="$CONTEXT" "$@"; }

namespace() { exists on_cluster get namespace "$1" || run_on_cluster create namespace "$1"; }

# -- create and delete

APIS=(artifactregistry cloudbuild cloudresourcemanager compute container containerfilesystem dns firestore iam
  iamcredentials logging monitoring ondemandscanning pubsub storage)
# The nodes are the first; Config Connector, which makes what is in k8s/gcp, is the second.
ACCOUNTS=(flux-fill-nodes flux-fill-config)
# Their roles on the project. Config Connector may grant there what k8s/gcp grants there, and nothing else.
ROLES=(
  "flux-fill-nodes container.defaultNodeServiceAccount"
  "flux-fill-config artifactregistry.admin"
  "flux-fill-config datastore.owner"
  "flux-fill-config iam.serviceAccountAdmin"
  "flux-fill-config pubsub.admin"
  "flux-fill-config resourcemanager.projectIamAdmin"
  "flux-fill-config storage.admin"
)
GRANTABLE="'roles/datastore.user', 'roles/logging.logWriter', 'roles/monitoring.viewer', 'roles/ondemandscanning.admin'"

email() { echo "$1@$PROJECT.iam.gserviceaccount.com"; }

is_account() { exists gcloud iam service-accounts describe "$(email "$1")" --project="$PROJECT"; }

# project_role add|remove ACCOUNT ROLE
project_role() {
  local condition=None
  if [[ $3 == resourcemanager.projectIamAdmin ]]; then
    condition="^;^title=roles of k8s/gcp;expression=api.getAttribute('iam.googleapis.com/modifiedGrantsByRole', [])"
    condition+=".hasOnly([$GRANTABLE])"
  fi
  local how=run
  [[ $1 == remove ]] || how=patiently
  $how gcloud projects "$1-iam-policy-binding" "$PROJECT" --member="serviceAccount:$(email "$2")" \
    --role="roles/$3" --condition="$condition" --format=none
}

# A new account is not known everywhere at once.
patiently() {
  local attempt
  for attempt in 1 2 3 4 5; do
    if run "$@"; then return; fi
    sleep $((attempt * 5))
  done
  die "gave up"
}

# ensure GROUP NAME [OPTION...] -- [OPTION...]: creates what is not there. The first options are those that name it.
ensure() {
  local words naming=()
  read -ra words <<<"$1"
  shift
  while [[ $1 != -- ]]; do
    naming+=("$1")
    shift
  done
  exists gcloud "${words[@]}" describe "${naming[@]}" --project="$PROJECT" ||
    run gcloud "${words[@]}" create "${naming[@]}" --project="$PROJECT" "${@:2}"
}

# destroy GROUP NAME [OPTION...]: deletes what is there.
destroy() {
  local words
  read -ra words <<<"$1"
  if [[ -n $dry_run ]] || exists gcloud "${words[@]}" describe "${@:2}" --project="$PROJECT"; then
    run gcloud "${words[@]}" delete "${@:2}" --project="$PROJECT"
  fi
}

# Nodes have no addresses of their own: Google's APIs are reached by Private Google Access, which is what the pods' network
# policies allow, and the rest of the world, for image registries and the hub, by NAT.
NETWORK=flux-fill
ZONE=(--zone=flux-fill-googleapis)

create_network() {
  ensure "compute networks" $NETWORK -- --subnet-mode=custom
  ensure "compute networks subnets" $NETWORK --region="$REGION" -- --network=$NETWORK --range=10.10.0.0/20 \
    --enable-private-ip-google-access
  ensure "compute routers" $NETWORK --region="$REGION" -- --network=$NETWORK
  ensure "compute routers nats" $NETWORK --router=$NETWORK --region="$REGION" -- --auto-allocate-nat-external-ips \
    --nat-all-subnet-ip-ranges
  ensure "dns managed-zones" flux-fill-googleapis -- --dns-name=googleapis.com. --visibility=private --networks=$NETWORK \
    --description="Private Google Access"
  ensure "dns record-sets" private.googleapis.com. "${ZONE[@]}" --type=A -- --ttl=300 \
    --rrdatas=199.36.153.8,199.36.153.9,199.36.153.10,199.36.153.11
  ensure "dns record-sets" "*.googleapis.com." "${ZONE[@]}" --type=CNAME -- --ttl=300 --rrdatas=private.googleapis.com.
}

delete_network() {
  destroy "dns record-sets" "*.googleapis.com." "${ZONE[@]}" --type=CNAME
  destroy "dns record-sets" private.googleapis.com. "${ZONE[@]}" --type=A
  destroy "dns managed-zones" flux-fill-googleapis
  destroy "compute routers nats" $NETWORK --router=$NETWORK --region="$REGION" --quiet
  destroy "compute routers" $NETWORK --region="$REGION" --quiet
  destroy "compute networks subnets" $NETWORK --region="$REGION" --quiet
  destroy "compute networks" $NETWORK --quiet
}

# pool NAME MOST [OPTION...]
pool() {
  ensure "container node-pools" "$1" --cluster="$CLUSTER" --location="$LOCATION" -- \
    --machine-type=g2-standard-8 --accelerator=type=nvidia-l4,count=1,gpu-driver-version=latest \
    --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes="$2" --location-policy=ANY \
    --ephemeral-storage-local-ssd=count=1 --enable-image-streaming --workload-metadata=GKE_METADATA \
    --service-account="$(email flux-fill-nodes)" --scopes=cloud-platform "${@:3}"
}

create() {
  need_project
  run gcloud services enable "${APIS[@]/%/.googleapis.com}" --project="$PROJECT"
  local account role
  for account in "${ACCOUNTS[@]}"; do
    is_account "$account" || run gcloud iam service-accounts create "$account" --project="$PROJECT"
  done
  for role in "${ROLES[@]}"; do
    # shellcheck disable=SC2086 # two words
    project_role add $role
  done
  create_network
  # Its first pool is the one without GPUs. Dataplane V2 is what enforces network policies.
  ensure "container clusters" "$CLUSTER" --location="$LOCATION" -- --network=$NETWORK --subnetwork=$NETWORK \
    --enable-private-nodes --enable-ip-alias --release-channel=regular --enable-dataplane-v2 \
    --workload-pool="$PROJECT.svc.id.goog" --enable-shielded-nodes --autoscaling-profile=optimize-utilization \
    --addons=HorizontalPodAutoscaling,HttpLoadBalancing,GcePersistentDiskCsiDriver,GcsFuseCsiDriver,ConfigConnector \
    --machine-type="$CPU_MACHINE" --num-nodes=1 --enable-autoscaling --total-min-nodes=1 \
    --total-max-nodes="$CPU_NODES" --disk-type=pd-balanced --disk-size=100 --enable-image-streaming \
    --workload-metadata=GKE_METADATA --service-account="$(email flux-fill-nodes)" --scopes=cloud-platform
  pool l4 "$GPU_NODES"
  if ((SPOT_NODES)); then
    pool l4-spot "$SPOT_NODES" --spot --node-taints=cloud.google.com/gke-spot=true:NoSchedule
  fi
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --location="$LOCATION"
  create_config_connector
  create_kuberay
}

create_config_connector() {
  local object=configconnector.core.cnrm.cloud.google.com yaml
  yaml="apiVersion: core.cnrm.cloud.google.com/v1beta1
kind: ConfigConnector
metadata: {name: $object}
spec: {mode: cluster, googleServiceAccount: $(email flux-fill-config), stateIntoSpec: Absent}"
  patiently gcloud iam service-accounts add-iam-policy-binding "$(email flux-fill-config)" --project="$PROJECT" \
    --member="serviceAccount:$PROJECT.svc.id.goog[cnrm-system/cnrm-controller-manager]" \
    --role=roles/iam.workloadIdentityUser --format=none
  run_on_cluster wait --for=create crd/configconnectors.core.cnrm.cloud.google.com --timeout=10m
  run_on_cluster apply --filename=- <<<"$yaml"
  printf '%s\n' "$yaml"
  run_on_cluster wait configconnector/$object --for=jsonpath='{.status.healthy}'=true --timeout=10m
  namespace flux-fill-google
}

create_kuberay() {
  namespace kuberay-system
  # On the server: the definitions are too large for the annotation that kubectl would keep them in.
  run_on_cluster apply --server-side --kustomize="$root/scripts/kuberay"
  run_on_cluster rollout status deployment/kuberay-operator --namespace=kuberay-system --timeout=5m
}

delete() {
  need_project
  local account role
  # gcloud asks first.
  destroy "container clusters" "$CLUSTER" --location="$LOCATION"
  delete_network
  for account in "${ACCOUNTS[@]}"; do
    [[ -n $dry_run ]] || is_account "$account" || continue
    for role in "${ROLES[@]}"; do
      # shellcheck disable=SC2086 # two words
      [[ $role != "$account "* ]] || project_role remove $role || echo "it had no such role"
    done
    run gcloud iam service-accounts delete "$(email "$account")" --project="$PROJECT" --quiet
  done
}

# -- what runs on it

repository() {
  need_project
  gcloud artifacts repositories describe flux-fill --project="$PROJECT" --location="$REGION" --format='value(registryUri)'
}

# What the image is made of. A commit that changes nothing of it needs no new image, and starts no new cluster.
SOURCES=(.dockerignore Dockerfile LICENSE README.md benchmarks container deployments package-lock.json package.json
  pyproject.toml requirements serve_app)

tag() { echo "${TAG:-$(git -C "$root" log -1 --abbrev=12 --format=%h -- "${SOURCES[@]}")}"; }

# The image by its digest: a tag that moves changes nothing that runs.
image() {
  local name digest
  name=$(repository)/flux-fill-serve || die "apply k8s/gcp first: there is no image repository"
  digest=$(gcloud artifacts docker images describe "$name:$(tag)" --format='value(image_summary.digest)') ||
    die "there is no image $name:$(tag): build it, or set TAG or IMAGE"
  echo "$name@$digest"
}

build() {
  local tagged changed name
  if [[ -z ${TAG:-} ]]; then
    # What is sent is the working tree, and the tag names a commit.
    changed=$(git -C "$root" status --porcelain -- "${SOURCES[@]}")
    [[ -z $changed ]] || die "commit these first, or set TAG:"$'\n'"$changed"
  fi
  name=$(repository) || die "there is no repository for images: apply k8s/gcp first"
  tagged=$name/flux-fill-serve:$(tag)
  if exists gcloud artifacts docker images describe "$tagged"; then
    echo "$tagged exists"
    return
  fi
  run gcloud builds submit "$root" --project="$PROJECT" --region="$REGION" --config="$root/cloudbuild.yaml" \
    --gcs-source-staging-dir="gs://$PROJECT-build/source" \
    --service-account="projects/$PROJECT/serviceAccounts/$(email flux-fill-build)" \
    --substitutions="_IMAGE=$tagged,_REVISION=$(tag)"
}

# Looks up only what the folder names.
render() {
  local text
  text=$(kubectl kustomize "$1")
  if [[ $text == *example-project* ]]; then need_project; fi
  if [[ $text == *123456789012* && -z ${PROJECT_NUMBER:-} ]]; then
    PROJECT_NUMBER=$(gcloud projects describe "$PROJECT" --format='value(projectNumber)')
  fi
  if [[ $text == *flux-fill.example.com* && -z $PUBLIC_HOST ]]; then
    die "set PUBLIC_HOST: the name under which the service is reached"
  fi
  if [[ $text == *flux-fill-serve:0.1.0* && -z ${IMAGE:-} ]]; then IMAGE=$(image); fi
  sed -e "s|example-project|$PROJECT|g" -e "s|123456789012|${PROJECT_NUMBER:-}|g" -e "s|us-central1|$REGION|g" \
    -e "s|flux-fill\.example\.com|$PUBLIC_HOST|g" -e "s|flux-fill-serve:0\.1\.0|${IMAGE:-}|g" <<<"$text"
}

# Renders DIR into the file $objects, which is removed at the end.
render_to_file() {
  objects=$(mktemp)
  trap 'rm -f "$objects"' EXIT
  render "$1" >"$objects"
}

# The names of the secrets that the objects in a file refer to.
secrets_of() {
  awk '/secretName:/ { print $NF } /secret(Key)?Ref:/ { inside = 1 } inside && / name:/ { print $NF; inside = 0 }' "$1" |
    sort -u
}

has_kind() { grep -q "^kind: $1\$" "$objects"; }

apply() {
  render_to_file "$1"
  # shellcheck disable=SC2046 # several words
  secrets $(secrets_of "$objects")
  run_on_cluster apply --filename="$objects"
  if grep -q '^apiVersion: .*\.cnrm\.cloud\.google\.com/' "$objects"; then
    run_on_cluster wait --for=condition=Ready --filename="$objects" --timeout=20m
  fi
  if has_kind FirestoreDatabase; then
    # Config Connector has no resource for this part of k8s/firestore.indexes.json.
    run gcloud firestore indexes fields update record --collection-group=jobs --disable-indexes --project="$PROJECT"
  fi
  if grep -q '^  name: weights$' "$objects"; then
    # First, because it is removed ten minutes after its end. Its first condition comes with the end, good or bad.
    run_on_cluster wait job/weights --namespace=flux-fill --for=jsonpath='{.status.conditions[0].status}'=True --timeout=2h
    run_on_cluster wait job/weights --namespace=flux-fill --for=condition=Complete --timeout=1m ||
      die "see kubectl -n flux-fill logs job/weights"
  fi
  if has_kind RayService; then
    run_on_cluster wait rayservice/flux-fill --namespace=flux-fill --for=condition=Ready --timeout=30m
  fi
}

remove() {
  # What is deleted is found by its name: no image has to be there.
  IMAGE=none PUBLIC_HOST=none.invalid
  render_to_file "$1"
  if has_kind RayService; then
    # First, and until its clusters are gone: they clean up in Redis by a Job, which a namespace that ends refuses
    # (kuberay#3388).
    run_on_cluster delete rayservice flux-fill --namespace=flux-fill --ignore-not-found --cascade=foreground
  fi
  run_on_cluster delete --ignore-not-found --filename="$objects"
}

restart() {
  local annotation
  annotation="{\"fluxfill/restarted\": \"$(date -u +%FT%TZ)\"}"
  run_on_cluster patch rayservice/flux-fill --namespace=flux-fill --type=merge \
    --patch="{\"spec\": {\"rayClusterConfig\": {\"headGroupSpec\": {\"template\": {\"metadata\": {\"annotations\": $annotation}}}}}}"
}

# -- secrets

secrets() {
  local name secret
  [[ $# -eq 0 ]] || namespace flux-fill
  for name; do
    if exists on_cluster get secret "$name" --namespace=flux-fill; then
      echo "secret/$name exists"
      continue
    fi
    secret=$(values "$name")
    # As input: others on this machine can read command lines.
    run_on_cluster create --filename=- <<<"$secret"
  done
}

values() {
  printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: flux-fill}\nstringData:\n' "$1"
  case $1 in
    ray-token) echo "  auth_token: $(openssl rand -hex 32)" ;;
    redis) echo "  password: $(openssl rand -hex 32)" ;;
    flux-fill)
      echo "  API_KEYS: $(openssl rand -hex 32):jobs+audit"
      echo "  WEBHOOK_SECRET: whsec_$(openssl rand -base64 32)"
      ;;
    hugging-face)
      [[ -n ${HF_TOKEN:-} ]] || die "set HF_TOKEN: the repository of FLUX.1-Fill-dev is gated"
      echo "  HF_TOKEN: $HF_TOKEN"
      ;;
    *) die "no secret $1: they are ray-token, redis, flux-fill and hugging-face" ;;
  esac
}

# -- one edit

edit() {
  need_project
  local folder session
  session=first-$(date +%s)
  folder=gs://$PROJECT-photos/users/gke/sessions/$session
  run gcloud storage cp "$1" "$folder/original.jpg"
  run gcloud storage cp "$2" "$folder/mask_auto.png"
  run gcloud pubsub topics publish session-processing --project="$PROJECT" \
    --message="{\"userId\": \"gke\", \"sessionId\": \"$session\"}"
  SECONDS=0
  until exists gcloud storage objects describe "$folder/edited.jpg"; do
    ((SECONDS < 1800)) || die "no result after half an hour: see First looks in docs/operations.md"
    sleep 5
  done
  run gcloud storage cp "$folder/edited.jpg" "$3"
  echo "edited after $SECONDS s"
}

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2 && exit 2; }

command=${1:-}
[[ $# -eq 0 ]] || shift
case $command in
  create | delete)
    [[ $# -eq 0 || $* == --dry-run ]] || usage
    dry_run=${1:-}
    ;;
  apply | remove | render) [[ $# -eq 1 ]] || usage ;;
  build | restart) [[ $# -eq 0 ]] || usage ;;
  edit) [[ $# -eq 3 ]] || usage ;;
  secrets) [[ $# -gt 0 ]] || set -- ray-token redis flux-fill hugging-face ;;
  *) usage ;;
esac
if [[ -n $dry_run ]]; then set --; fi
"$command" "$@"
