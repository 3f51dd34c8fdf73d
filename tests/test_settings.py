"""The settings tree: what it refuses, and that its defaults are the documented ones."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.models import BUILT_IN
from serve_app.settings import (
    BUCKETS,
    Inference,
    Limits,
    MessagesSettings,
    Scaling,
    Secrets,
    Settings,
    VariantSettings,
    Work,
)

TELEA: dict[str, Any] = {"variants": {"telea": {}}}


def refused(changes: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({**TELEA, **changes})
    return str(caught.value)


def test_the_documented_defaults() -> None:
    inference, limits, work = Inference(), Limits(), Work()
    assert inference.prompt == "seamless natural background matching surrounding area, photorealistic"
    assert (inference.steps, inference.guidance_scale, inference.variant) == (28, 30.0, "Q8_0")
    assert inference.crop_strategy == "auto"
    assert (limits.image_bytes, limits.image_pixels, limits.image_side_px) == (25_000_000, 50_000_000, 10_000)
    assert limits.message_bytes == 64_000
    assert (work.lease_s, work.renew_s, work.max_attempts, work.inference_timeout_s) == (60, 20, 5, 240)
    messages = MessagesSettings()
    assert (messages.topic, messages.dead_letter_topic) == ("session-processing", "session-processing-dead")
    assert messages.is_embedded


def test_the_embedded_default_needs_nothing_but_this_machine() -> None:
    settings = Settings.model_validate(TELEA)
    assert (settings.blobs, settings.jobs) == ("files:var/blobs", "sqlite:var/jobs.db")
    assert settings.messages.url == "embedded://127.0.0.1:8085"
    assert settings.nodes == settings.ingress_replicas == 1
    assert (settings.weights.cache, settings.weights.mirror) == (Path("var/weights"), None)


def test_the_built_in_variants() -> None:
    on_gpus, on_cpus = ["Q4_0", "Q5_K_S", "Q8_0", "klein-4B"], ["tiny-Q4_0", "tiny-Q5_K_S", "tiny-Q8_0", "tiny-klein"]
    repacked = {"Q8_0-w8a8": "w8a8", "Q8_0-fp8": "fp8", "tiny-Q8_0-w8a8": "w8a8", "Q8_0-turbo-w8a8": "w8a8"}
    with_loras = {"Q8_0-turbo", "Q8_0-turbo-w8a8", "tiny-Q8_0-turbo"}
    editors = {name for name, row in BUILT_IN.items() if row.generation is None}
    assert editors == {*on_gpus, *on_cpus, *repacked, *with_loras, "telea"}
    generators = {"sdxl", "flux-dev-Q8_0", "flux-dev-Q4_0", "tiny-sdxl", "tiny-flux-dev", "fake"}
    assert BUILT_IN.keys() - editors == generators
    on_gpus += [*(with_loras - {"tiny-Q8_0-turbo"}), "Q8_0-w8a8", "Q8_0-fp8", "sdxl", "flux-dev-Q8_0", "flux-dev-Q4_0"]
    assert {name for name, row in BUILT_IN.items() if row.num_gpus} == {*on_gpus}
    assert {name: row.repack for name, row in BUILT_IN.items() if row.repack} == repacked
    assert all(BUILT_IN[name].file == BUILT_IN[name.rpartition("-")[0]].file for name in repacked)
    assert {name: row.steps for name, row in BUILT_IN.items() if row.loras} == dict.fromkeys(with_loras, 8)
    assert not BUILT_IN["telea"].takes_prompt and BUILT_IN["tiny-Q4_0"].takes_prompt


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"blob": "files:x"}, "blob"),
        ({"messages": {"topics": "x"}}, "messages.topics"),
        ({"variants": {"telea": {"gpus": 1}}}, "variants.telea.gpus"),
        ({"work": {"lease": 1}}, "work.lease"),
        ({"windows": {"bucket": []}}, "windows.bucket"),
        ({"limits": {"image_byte": 1}}, "limits.image_byte"),
        ({"weights": {"lockfile": "x"}}, "weights.lockfile"),
        ({"text_encoder": {"gpu": 1}}, "text_encoder.gpu"),
        ({"variants": {"x": {"definition": {"family": "telea", "quant": 1}}}}, "variants.x.definition.quant"),
    ],
)
def test_unknown_keys_are_refused_and_named(changes: dict[str, Any], key: str) -> None:
    message = refused(changes)
    assert key in message and "Extra inputs are not permitted" in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"nodes": 0}, "nodes"),
        ({"variants": {}}, "variants"),
        ({"ingress_replicas": 0}, "ingress_replicas"),
        ({"messages": {"project": "-x"}}, "messages.project"),
        ({"messages": {"max_in_flight": 0}}, "messages.max_in_flight"),
        ({"limits": {"image_bytes": 0}}, "limits.image_bytes"),
        ({"windows": {"feather_px": -1}}, "windows.feather_px"),
        ({"work": {"backoff_max_s": 601}}, "work.backoff_max_s"),
        ({"work": {"max_attempts": 0}}, "work.max_attempts"),
        ({"variants": {"telea": {"num_cpus": 0}}}, "variants.telea.num_cpus"),
        ({"variants": {"telea": {"min_replicas": -1}}}, "variants.telea.min_replicas"),
        ({"variants": {"telea": None}}, "variants.telea"),
        ({"variants": ["telea"]}, "variants"),
    ],
)
def test_values_out_of_range_are_refused_and_named(changes: dict[str, Any], key: str) -> None:
    assert f"\n{key}\n" in refused(changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {"Q9_9": {}}}, "variants.Q9_9: not built in (those are Q4_0"),
        ({"variants": {"telea": {"min_replicas": 2, "max_replicas": 1}}}, "min_replicas 2 is more than max_replicas 1"),
        ({"work": {"lease_s": 30}}, "renew_s must be less than half of lease_s"),
        ({"windows": {"buckets": []}}, "at least one size"),
        ({"windows": {"buckets": [[512, 500]]}}, "512x500 is not two multiples of 16"),
        ({"windows": {"buckets": [[2048, 512]]}}, "2048x512 is not two multiples of 16 up to 1024"),
        (
            {"variants": {"x": {"definition": {"family": "flux-fill", "loras": [{"file": "x.bin"}]}}}},
            "variants.x.definition.loras.0.file",
        ),
        (
            {"variants": {"x": {"definition": {"family": "telea", "loras": [{"file": "x.safetensors"}]}}}},
            "loras: a variant of family telea has none of its own",
        ),
        ({"nodes": 2}, "nodes is 2, but blobs, jobs, messages.url works on one machine only"),
        ({"nodes": 2, "blobs": "s3:b", "jobs": "memory:", "messages": {"url": "pubsub:"}}, "but jobs works on one"),
    ],
)
def test_values_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    assert words in refused(changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"steps": 0}, "steps"), ({"steps": 28.5}, "steps"), ({"guidance_scale": 101}, "guidance_scale"),
     ({"guidance_scale": float("nan")}, "guidance_scale"), ({"prompt": "x" * 2001}, "prompt"),
     ({"crop_strategy": "zoom"}, "crop_strategy"), ({"seed": 1}, "seed")],
)  # fmt: skip
def test_inference_defaults_keep_to_the_messages_ranges(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Inference.model_validate(changes)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Limits().image_bytes = 1


def test_a_definition_of_ones_own() -> None:
    settings = Settings.model_validate({"variants": {"slow": {"definition": {"family": "pause", "pause_s": 0.25}}}})
    assert settings.variant("slow").pause_s == 0.25
    with pytest.raises(KeyError):
        settings.variant("telea")


def test_a_served_variant_may_have_fewer_prompt_tokens_than_its_definition() -> None:
    settings = Settings.model_validate({"variants": {"Q8_0": {"max_prompt_tokens": 256}, "Q4_0": {}}})
    assert settings.variant("Q8_0") == BUILT_IN["Q8_0"].model_copy(update={"max_prompt_tokens": 256})
    assert settings.variant("Q4_0") == BUILT_IN["Q4_0"]


def test_messages_in_flight_keep_every_replica_busy() -> None:
    settings = Settings(variants={"telea": VariantSettings(max_replicas=3), "Q8_0": VariantSettings()})
    assert settings.in_flight() == (2 * 3 + 2) + (2 * 1 + 2)
    few = MessagesSettings(max_in_flight=1)
    assert settings.model_copy(update={"messages": few}).in_flight() == 1


def test_every_bucket_is_one_the_model_takes() -> None:
    assert all(width % 16 == height % 16 == 0 and max(width, height) <= 1024 for width, height in BUCKETS)
    assert len(set(BUCKETS)) == len(BUCKETS)


def test_scaling_defaults_to_zero() -> None:
    assert (Scaling().min_replicas, Scaling().max_replicas) == (0, 1)


def test_secrets_come_from_the_environment_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    secrets = Secrets.from_environment()
    assert secrets.hf_token and secrets.hf_token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in repr(secrets) + secrets.model_dump_json()
    monkeypatch.setenv("HF_TOKEN", "")
    assert Secrets.from_environment().hf_token is None


def test_every_secret_is_read_and_none_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Secrets.model_fields:
        monkeypatch.setenv(name.upper(), f"the {name}")
    secrets = Secrets.from_environment()
    for name in Secrets.model_fields:
        assert getattr(secrets, name).get_secret_value() == f"the {name}"
    assert "the " not in repr(secrets) + str(secrets) + secrets.model_dump_json()


PRODUCTION = [{"messages": {"url": "pubsub:", "project": "p-1"}}, {"nodes": 2, 
    "blobs": "firebase:b", "jobs": "firestore:p", "messages": {"url": "pubsub://10.0.0.1:8085"}
}]  # fmt: skip
VERIFIED = {"audience": "https://fluxfill.example.org/inpaint", "service_account": "push@p.iam.gserviceaccount.com"}


@pytest.mark.parametrize("where", PRODUCTION)
def test_production_does_not_start_with_pushes_that_nobody_verifies(where: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"push\.audience and push\.service_account"):
        Settings(variants={"telea": {}}, **where)
    assert Settings(variants={"telea": {}}, push=VERIFIED, **where).push.is_verified
    assert not Settings(variants={"telea": {}}, push={"enabled": False}, **where).push.enabled


@pytest.mark.parametrize("half", VERIFIED)
def test_a_push_token_is_checked_for_both_or_for_neither(half: str) -> None:
    with pytest.raises(ValidationError, match="or neither"):
        Settings(variants={"telea": {}}, push={half: VERIFIED[half]})


@pytest.mark.parametrize("key", ["blobs", "jobs", "sessions"])
def test_a_password_in_a_url_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValidationError, match=key) as refused:
        Settings(variants={"telea": {}}, **{key: "postgresql://user:hunter2@host/db"})
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"jobs": "postgresql://user@host/db?password=hunter2"},
        {"jobs": "postgresql://host/db?sslmode=require&sslpassword=hunter2"},
        {"blobs": "s3://bucket?endpoint=https://k:hunter2@minio:9000"},
        {"blobs": "s3://bucket?endpoint=https%3A%2F%2Fk%3Ahunter2%40minio"},
        {"messages": {"url": "pubsub://u:hunter2@broker:8085"}},
        {"weights": {"mirror": "s3://key:hunter2@bucket"}},
        {"public_url": "http://u:hunter2@127.0.0.1:8000"},
        {"blobs": "s3://hunter2@bucket"},
        {"messages": {"url": "pubsub://hunter2@broker:8085"}},
        {"jobs": "postgresql://host/db#password=hunter2"},
        {"jobs": "postgresql://host/db?sslmode=require;password=hunter2"},
    ],
    ids=str,
)
def test_a_password_anywhere_in_a_url_is_refused_and_not_repeated(changes: dict[str, Any]) -> None:
    said = refused(changes)
    assert "a password does not belong in a config" in said
    assert "hunter2" not in said


def test_what_is_no_url_is_not_repeated() -> None:
    said = refused({"jobs": "postgresql://u:hunter2\u2100@h/db"})
    assert "jobs: not a URL" in said and "hunter2" not in said


def test_what_names_a_file_or_a_user_is_no_password() -> None:
    url = "postgresql://user@host/db?sslmode=verify-full&sslkey=/k.pem&passfile=/p"
    assert Settings(variants={"telea": {}}, jobs=url).jobs == url


@pytest.mark.parametrize(
    "changes",
    [
        {"blobs": "s3://bucket/app", "weights": {"mirror": "s3://bucket/app"}},
        {"blobs": "s3://bucket/app?region=eu", "weights": {"mirror": "s3://bucket/app/models/?endpoint=http://m"}},
        {"blobs": "s3://bucket/app", "weights": {"mirror": "s3://bucket"}},
        {"blobs": "firebase:bucket", "weights": {"mirror": "firebase:bucket"}},
        {"blobs": "files:var/blobs", "weights": {"mirror": "files:var/blobs/models"}},
        {"blobs": "files:var/blobs", "weights": {"mirror": "files:var"}},
        {"blobs": "files:var/blobs", "weights": {"mirror": "files:var/x/../blobs"}},
        {"blobs": "files:var/blobs", "weights": {"cache": "var/blobs/weights"}},
        {"blobs": "files:var/blobs", "weights": {"cache": Path("var/blobs").absolute()}},
        {"blobs": "files:var/blobs", "weights": {"cache": "var"}},
        {"blobs": "files:var/blobs", "weights": {"lock": "var/blobs/weights.lock.json"}},
        *(
            {"blobs": "files:var/blobs", "variants": {"v": {"definition": {"family": "flux-fill", **definition}}}}
            for definition in (
                {"file": "var/blobs/x.gguf", "base": "a/b"},
                {"file": "x.gguf", "base": "a/b", "loras": [{"file": "var/blobs/x.safetensors"}]},
            )
        ),
    ],
    ids=str,
)
def test_weights_lie_where_no_user_writes(changes: dict[str, Any]) -> None:
    assert "it shares a folder with blobs" in refused(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"blobs": "s3://bucket/app", "weights": {"mirror": "s3://bucket/app-models"}},
        {"blobs": "s3://bucket", "weights": {"mirror": "s3://another"}},
        {"blobs": "s3://bucket", "weights": {"mirror": "files:bucket"}},
        {"blobs": "files:var/blobs", "weights": {"mirror": "files:var/blobs-models", "cache": "var/weights"}},
    ],
    ids=str,
)
def test_weights_beside_the_photos_are_fine(changes: dict[str, Any]) -> None:
    assert Settings.model_validate({**TELEA, **changes}).weights.mirror


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ({"dead_letter_subscription": "session-processing"}, "dead_letter_subscription"),
        ({"dead_letter_topic": "session-processing"}, "must differ"),
        ({"completion_topic": "session-processing"}, "must differ"),
    ],
)
def test_messages_never_go_in_a_circle(messages: dict[str, str], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Settings(variants={"telea": {}}, messages=messages)


@pytest.mark.parametrize("url", ["https://app.example.org", "http://10.0.0.7:8000", "http://[fe80::1]:8000"])
def test_a_public_address_is_production(url: str) -> None:
    assert "push.audience" in refused({"public_url": url})
    assert Settings.model_validate({**TELEA, "public_url": url, "push": {"enabled": False}}).is_production


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://[::1]:8000/prefix", "http://127.0.0.1"])
def test_a_loopback_address_is_not(url: str) -> None:
    assert not Settings.model_validate({**TELEA, "public_url": url}).is_production
