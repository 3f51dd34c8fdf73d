"""What schemas miss: rules of ours for the rendered objects. Each yields a sentence, with object and field, for what
breaks it."""

from collections.abc import Callable, Iterator

from . import rules_google, rules_pods, rules_ray, rules_references, schemas
from .objects import Objects

Rule = Callable[[Objects], Iterator[str]]

ACCEPTED = rules_ray.serve_config_is_accepted
#: Rules that ask the app about its settings: only where it accepts them.
OF_THE_APP: tuple[Rule, ...] = (
    rules_ray.groups_start_from_zero,
    rules_ray.gpu_nodes_are_left_to_painting,
    rules_ray.painters_ask_for_their_gpu,
    rules_ray.groups_hold_what_serve_asks_for,
    rules_ray.settings_know_the_cluster,
    rules_ray.drains_hold,
    rules_ray.the_ingress_stops_first,
    rules_ray.serve_listens_where_kuberay_asks,
    rules_references.users_of_google_have_an_identity,
    rules_google.the_app_finds_what_it_names,
)
OF_THE_CLUSTER: tuple[Rule, ...] = (
    schemas.schemas_hold,
    rules_ray.head_holds_no_work,
    rules_ray.autoscaler_is_v2,
    rules_ray.ray_pods_never_restart,
    rules_ray.upgrade_makes_a_new_cluster,
    rules_ray.one_token_for_both_clusters,
    rules_ray.gcs_survives_the_head,
    rules_ray.redis_keeps_its_data,
    rules_ray.the_head_leaves_last,
    rules_ray.nothing_stops_ray_beforehand,
    rules_ray.probes_are_kuberays,
    rules_ray.ray_container_is_first,
    rules_ray.metrics_ports_have_names,
    rules_ray.kuberay_accepts_the_groups,
    rules_ray.memory_is_not_overdrawn,
    rules_pods.images_are_pinned,
    rules_pods.nobody_is_root,
    rules_pods.root_is_read_only,
    rules_pods.privileges_do_not_grow,
    rules_pods.capabilities_are_dropped,
    rules_pods.seccomp_is_on,
    rules_pods.host_is_left_alone,
    rules_pods.ray_can_write,
    rules_pods.resources_are_stated,
    rules_pods.head_is_evicted_last,
    rules_pods.ports_are_used_once,
    rules_pods.secrets_stay_in_secrets,
    rules_pods.only_the_head_asks_kubernetes,
    rules_pods.fuse_has_its_annotation,
    rules_pods.gpu_pods_find_their_nodes,
    rules_pods.bytecode_is_used,
    rules_references.budgets_select_pods,
    rules_references.policies_select_pods,
    rules_references.services_select_pods,
    rules_references.monitors_scrape_pods,
    rules_references.what_is_named_exists,
    rules_references.secrets_have_their_keys,
    rules_references.quota_admits_an_upgrade,
    rules_references.quota_lets_every_container_in,
    rules_google.dead_letters_have_the_agents_roles,
    rules_google.subscriptions_never_expire,
    rules_google.resources_point_at_each_other,
    rules_google.accounts_are_bound_at_google,
    rules_google.buckets_open_to_who_mounts_them,
)


def broken(objects: Objects) -> dict[str, list[str]]:
    """The rules that the objects break, by name, each with its sentences."""
    refused = list(ACCEPTED(objects))
    found = {rule.__name__: list(rule(objects)) for rule in (*OF_THE_CLUSTER, *(() if refused else OF_THE_APP))}
    return {name: what for name, what in {ACCEPTED.__name__: refused, **found}.items() if what}
