import asyncio
import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from huggingface_hub import constants
from pydantic import SecretStr

from serve_app.adapters.memory import MemoryBlobStore
from serve_app.blobs import BlobInfo
from serve_app.engine.cold_start import recorded
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.weights import fetch, lock
from serve_app.engine.weights.fetch import Sources
from serve_app.engine.weights.origins import Mirror
from serve_app.errors import (
    CorruptWeights,
    FluxFillError,
    GatedRepo,
    MissingToken,
    SettingsError,
    UnknownWeights,
    UnsafePath,
    WeightsError,
)
from serve_app.models import BUILT_IN, Variant, VariantLora
from serve_app.settings import Secrets, WeightsSettings

from .hub_server import COMMIT, HubServer, Repo, serve

GGUF, BASE = "o/gguf", "o/base"
PAINTING = {"transformer/config.json", "vae/config.json", "vae/model.safetensors", "scheduler/scheduler_config.json"}
TEXT = {
    f"{folder}/{file}"
    for folder, file in [
        ("text_encoder", "config.json"),
        ("text_encoder", "model.safetensors"),
        ("text_encoder_2", "config.json"),
        ("text_encoder_2", "model-00001-of-00001.safetensors"),
        ("tokenizer", "tokenizer_config.json"),
        ("tokenizer_2", "tokenizer_config.json"),
    ]
}
VARIANT = Variant(family="flux-fill", repo=GGUF, file="q.gguf", base=BASE)
PINNED = VARIANT.model_copy(update={"revision": COMMIT, "base_revision": COMMIT})


@pytest.fixture
def hub(tiny: TinyWeights, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # The suite keeps the client off the network; this server is on loopback.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as hub:
        sound = tiny.transformer("flux1-fill-dev-Q4_0.gguf").read_bytes()
        hub.repos[GGUF] = Repo({"q.gguf": sound, "other.gguf": b"", "README.md": b""})
        hub.repos[BASE] = Repo({file: file.encode() for file in PAINTING | TEXT | {"flux1-fill-dev.safetensors"}})
        yield hub


@pytest.fixture
def sources(hub: HubServer, tmp_path: Path) -> Sources:
    return Sources(cache=tmp_path / "cache", endpoint=hub.url)


def mirror() -> tuple[MemoryBlobStore, Mirror]:
    store = MemoryBlobStore(uuid4().hex)
    return store, Mirror(store)


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not path.parts[0].startswith(".")}


async def test_the_hub_gives_what_painting_needs_and_no_more(hub: HubServer, sources: Sources) -> None:
    found = await fetch.fetch(PINNED, sources)
    assert found.transformer == sources.cache / "o--gguf" / COMMIT / "q.gguf"
    assert found.transformer.read_bytes() == hub.repos[GGUF].files["q.gguf"]
    assert files_below(found.base) == PAINTING
    assert sorted(hub.downloads) == sorted({"q.gguf", *PAINTING})


async def test_a_variants_loras_come_with_it_pinned_as_its_other_weights(hub: HubServer, sources: Sources) -> None:
    content = b"a LoRA's"
    hub.repos["o/lora"] = Repo({"turbo.safetensors": content, "other.safetensors": b"", "README.md": b""})
    variant = VARIANT.model_copy(update={"loras": (VariantLora(repo="o/lora", file="turbo.safetensors"),)})
    pinned = (await fetch.pin([variant], sources)).lock
    assert pinned.repos["o/lora"].revision == COMMIT
    assert {file: one.size for file, one in pinned.repos["o/lora"].files.items()} == {"turbo.safetensors": len(content)}
    locked = replace(sources, locked=pinned)
    hub.requests.clear()
    (lora,) = (await fetch.fetch(variant, locked)).loras
    assert lora == sources.cache / "o--lora" / COMMIT / "turbo.safetensors" and hub.downloads == []
    hub.repos["o/lora"].files["turbo.safetensors"] = b"another!"
    lora.write_bytes(b"damaged!")
    with pytest.raises(CorruptWeights, match=r"turbo\.safetensors"):
        await fetch.fetch(variant, locked)


async def test_a_lora_that_is_not_there_is_named(hub: HubServer, sources: Sources, tmp_path: Path) -> None:
    for lora in (
        VariantLora(repo=GGUF, file="none.safetensors", revision=COMMIT),
        VariantLora(file=f"{tmp_path}/none.safetensors"),
    ):
        with pytest.raises(UnknownWeights, match=r"none\.safetensors"):
            await fetch.fetch(PINNED.model_copy(update={"loras": (lora,)}), sources)


async def test_text_encoders_come_separately(sources: Sources) -> None:
    base = await fetch.fetch_text_encoders(PINNED, sources)
    assert files_below(base) == TEXT


async def test_the_cache_is_asked_before_the_hub(hub: HubServer, sources: Sources) -> None:
    first = await fetch.fetch(PINNED, sources)
    hub.requests.clear()
    assert await fetch.fetch(PINNED, sources) == first
    assert hub.requests == []


async def test_several_at_once_download_once(hub: HubServer, sources: Sources) -> None:
    found = await asyncio.gather(*(fetch.fetch(PINNED, sources) for _ in range(3)))
    assert found[0] == found[1] == found[2]
    assert sorted(hub.downloads) == sorted({"q.gguf", *PAINTING})


async def test_an_unpinned_repository_is_warned_about(
    hub: HubServer, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = await fetch.fetch(VARIANT, sources)
    assert found.base == sources.cache / "o--base" / "main"
    warned = [record for record in caplog.records if getattr(record, "action", "") == "weights_unpinned"]
    assert [record.repo for record in warned] == [GGUF, BASE]
    assert "fluxfill weights pull --pin" in warned[0].getMessage()


async def test_the_lock_file_pins_what_the_variant_does_not(hub: HubServer, sources: Sources) -> None:
    locked = lock.Lock(repos={BASE: lock.LockedRepo(revision=COMMIT, files={})})
    base = await fetch.fetch_text_encoders(VARIANT, replace(sources, locked=locked))
    assert base.name == COMMIT
    assert fetch.base_revision(VARIANT, replace(sources, locked=locked)) == COMMIT
    assert fetch.base_revision(VARIANT, sources) is None


async def test_a_download_that_broke_off_is_taken_up_again(hub: HubServer, sources: Sources) -> None:
    files = hub.repos[BASE].files
    # Listed under names that are not there: the client fails at the second file.
    broken = dict(files)
    del broken["vae/model.safetensors"]
    listed = list(files)

    class Vanishing(dict[str, bytes]):
        def __iter__(self) -> Iterator[str]:
            return iter(listed)

    hub.repos[BASE].files = Vanishing(broken)
    with pytest.raises(UnknownWeights, match=r"vae/model\.safetensors"):
        await fetch.fetch(PINNED, sources)
    hub.repos[BASE].files = files
    assert files_below((await fetch.fetch(PINNED, sources)).base) == PAINTING


@pytest.mark.parametrize(
    ("repo", "token", "error", "names"),
    [
        (None, None, MissingToken, "HF_TOKEN is not set.*o/gguf"),
        (None, "ours", UnknownWeights, "o/gguf at c"),
        (Repo({}, token="ours"), None, MissingToken, "HF_TOKEN is not set.*o/gguf"),
        (Repo({}, token="ours"), "wrong", MissingToken, "refuses the HF_TOKEN.*o/gguf"),
        (Repo({}, token="ours", gated=True), "ours", GatedRepo, "licence of o/gguf"),
        (Repo({"q.gguf": b""}, token="ours", listed=True), None, MissingToken, r"HF_TOKEN is not set.*q\.gguf"),
        (Repo({"q.gguf": b""}, token="ours", listed=True, gated=True), "ours", GatedRepo, "licence of o/gguf"),
        (Repo({}, commit="d" * 40), None, UnknownWeights, "o/gguf at c"),
        (Repo({"x.gguf": b""}), None, UnknownWeights, r"o/gguf at c+ has no q\.gguf"),
        (Repo({"q.gguf": b"<html>Sign in</html>"}), None, CorruptWeights, r"q\.gguf is not a valid GGUF file"),
    ],
)
async def test_each_refusal_has_its_error(
    hub: HubServer, sources: Sources, repo: Repo | None, token: str | None, error: type[FluxFillError], names: str
) -> None:
    del hub.repos[GGUF]
    if repo is not None:
        hub.repos[GGUF] = repo
    secret = SecretStr(token) if token else None
    with pytest.raises(error, match=names) as caught:
        await fetch.fetch(PINNED, replace(sources, token=secret))
    assert type(caught.value) is error
    assert "ours" not in str(caught.value)


async def test_a_token_that_may_opens_the_repository(hub: HubServer, sources: Sources) -> None:
    hub.repos[GGUF].token = "ours"
    found = await fetch.fetch(PINNED, replace(sources, token=SecretStr("ours")))
    assert found.transformer.exists()


async def test_a_hub_that_is_not_there_is_named(sources: Sources) -> None:
    away = replace(sources, endpoint="http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"http://127\.0\.0\.1:9 cannot be reached for o/gguf") as caught:
        await fetch.fetch(PINNED, away)
    assert type(caught.value) is WeightsError


async def test_a_client_that_is_kept_offline_says_so(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="offline mode is enabled"):
        await fetch.fetch(PINNED, sources)
    assert hub.requests == []


async def test_a_damaged_file_is_not_kept(hub: HubServer, sources: Sources) -> None:
    sound = hub.repos[GGUF].files["q.gguf"]
    hub.repos[GGUF].files["q.gguf"] = sound[:-1000]
    with pytest.raises(CorruptWeights, match="ends at byte"):
        await fetch.fetch(PINNED, sources)
    hub.repos[GGUF].files["q.gguf"] = sound
    assert (await fetch.fetch(PINNED, sources)).transformer.read_bytes() == sound


async def test_a_file_damaged_in_the_cache_is_fetched_again(hub: HubServer, sources: Sources) -> None:
    found = await fetch.fetch(PINNED, sources)
    found.transformer.write_bytes(b"GGUF, but not quite")
    again = await fetch.fetch(PINNED, sources)
    assert again.transformer.read_bytes() == hub.repos[GGUF].files["q.gguf"]


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder that the current user reaches even as another user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As on a volume that is mounted read-only."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    is_root = os.geteuid() == 0
    if is_root:
        # Permissions do not bind root.
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755)


async def test_a_whole_cache_may_be_mounted_read_only(hub: HubServer, sources: Sources, volume: Path) -> None:
    sources = replace(sources, cache=volume / "cache")
    await fetch.pull([PINNED], sources)
    hub.requests.clear()
    with read_only(volume):
        assert (await fetch.fetch(PINNED, sources)).transformer.is_file()
        assert set(files_below(await fetch.fetch_text_encoders(PINNED, sources))) >= TEXT
    assert hub.requests == []


async def test_a_read_only_cache_that_is_not_whole_is_named(sources: Sources, volume: Path) -> None:
    sources = replace(sources, cache=volume / "cache")
    found = await fetch.fetch(PINNED, sources)
    found.transformer.write_bytes(b"GGUF, but not quite")
    with read_only(volume), pytest.raises(WeightsError, match=r"o--gguf.* cannot be written to: Permission denied"):
        await fetch.fetch(PINNED, sources)
    assert found.transformer.is_file(), "what cannot be fetched again stays"
    empty = replace(sources, cache=volume / "cache" / "none")
    with read_only(volume), pytest.raises(WeightsError, match="cannot be written to"):
        await fetch.fetch(PINNED, empty)


#: Of the real repository: what is taken of it besides the weights, and some of what is not.
SDXL = {
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder_2/config.json",
    "tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json", "tokenizer_2/merges.txt", "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json", "tokenizer_2/vocab.json", "unet/config.json", "vae/config.json",
}  # fmt: skip
NOT_SDXL = {
    "README.md", "01.png", "sd_xl_base_1.0_0.9vae.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors", "text_encoder/openvino_model.bin", "tokenizer/flax.msgpack",
    "vae/diffusion_pytorch_model.safetensors", "vae_1_0/config.json", "vae_decoder/config.json",
}  # fmt: skip


async def test_of_sdxl_come_one_file_and_the_configs(hub: HubServer, sources: Sources) -> None:
    variant = Variant(family="sdxl", repo="o/sdxl", file="sd_xl.safetensors", base="o/sdxl")
    hub.repos["o/sdxl"] = Repo({file: file.encode() for file in SDXL | NOT_SDXL | {"sd_xl.safetensors"}})
    found = await fetch.fetch(variant, sources)
    assert found.transformer == found.base / "sd_xl.safetensors"
    assert files_below(found.base) == SDXL | {"sd_xl.safetensors"}
    pinned = await fetch.pin([variant], sources)
    assert set(pinned.lock.repos["o/sdxl"].files) == SDXL | {"sd_xl.safetensors"}
    store, mirrored = mirror()
    await fetch.push_to_mirror([variant], replace(sources, mirror=mirrored))
    paths = [info.path async for info in store.list("models")]
    assert len(paths) == len(SDXL) + 1


async def test_of_flux_comes_what_comes_of_fill(hub: HubServer, sources: Sources) -> None:
    found = await fetch.fetch(PINNED.model_copy(update={"family": "flux"}), sources)
    assert files_below(found.base) == PAINTING


async def test_each_built_in_variant_names_what_it_takes(sources: Sources) -> None:
    needs = fetch._needs(BUILT_IN.values(), lock.Lock())
    assert {need.repo for need in needs} == {
        *("YarvixPA/FLUX.1-Fill-dev-GGUF", "black-forest-labs/FLUX.1-Fill-dev", "black-forest-labs/FLUX.2-klein-4B"),
        "alimama-creative/FLUX.1-Turbo-Alpha",
        *("city96/FLUX.1-dev-gguf", "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-xl-base-1.0"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-flux-dev"])
async def test_tiny_generators_need_no_hub(sources: Sources, name: str) -> None:
    variant = BUILT_IN[name]
    made = await fetch.fetch(variant, sources)
    assert made.transformer.is_file() and (made.base / "vae" / "config.json").is_file()
    local = variant.model_copy(update={"file": str(made.transformer), "base": str(made.base)})
    assert await fetch.fetch(local, sources) == made


async def test_the_weights_of_sdxl_may_be_a_folder(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = str(tmp_path / "model")
    variant = Variant(family="sdxl", file=folder, base=folder)
    assert await fetch.fetch(variant, sources) == fetch.Weights(tmp_path / "model", tmp_path / "model")
    with pytest.raises(UnknownWeights, match="there is no file"):
        await fetch.fetch(variant.model_copy(update={"family": "flux"}), sources)


@pytest.mark.slow
async def test_tiny_and_local_weights_need_no_hub(sources: Sources, tiny: TinyWeights) -> None:
    made = await fetch.fetch(BUILT_IN["tiny-Q8_0"], sources)
    assert made.transformer.name == "flux1-fill-dev-Q8_0.gguf"
    assert (made.base / "vae" / "config.json").exists()
    local = Variant(family="flux-fill", file=str(made.transformer), base=str(made.base))
    assert await fetch.fetch(local, sources) == made


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": None}, "needs both `file` and `base`"),
        ({"repo": None, "file": "/nowhere/x.gguf"}, r"no file /nowhere/x\.gguf"),
        ({"base": "/nowhere"}, "'/nowhere' is neither a folder here nor a repository"),
    ],
)
async def test_a_variant_without_weights(sources: Sources, changes: dict[str, str | None], reason: str) -> None:
    with pytest.raises(UnknownWeights, match=reason):
        await fetch.fetch(PINNED.model_copy(update=changes), sources)


async def test_a_mirror_replaces_the_hub(
    hub: HubServer, sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, mirrored = mirror()
    told: list[tuple[str, str]] = []
    await fetch.push_to_mirror(
        [PINNED], replace(sources, mirror=mirrored), lambda repo, file, number, count: told.append((repo, file))
    )
    paths = [info.path async for info in store.list("models")]
    assert f"models/o--gguf/{COMMIT}/q.gguf" in paths
    assert len(paths) == 1 + len(PAINTING) + len(TEXT)
    assert told[-1][1].endswith(".json")
    hub.repos.clear()
    elsewhere = Sources(cache=tmp_path / "elsewhere", mirror=mirrored, endpoint=hub.url)
    found = await fetch.fetch(PINNED, elsewhere)
    assert files_below(found.base) == PAINTING
    assert "mirror_failed" not in [getattr(record, "action", "") for record in caplog.records]


async def test_the_hub_helps_out_where_the_mirror_is_not_whole(hub: HubServer, sources: Sources) -> None:
    store, mirrored = mirror()
    await store.put(f"models/o--base/{COMMIT}/vae/config.json", b"{}", content_type="application/json")
    found = await fetch.fetch(PINNED, replace(sources, mirror=mirrored))
    assert files_below(found.base) == PAINTING
    assert (found.base / "vae/config.json").read_bytes() == b"vae/config.json"


async def test_a_name_that_would_leave_the_cache_is_refused(sources: Sources) -> None:
    class Hostile(MemoryBlobStore):
        async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
            async for info in super().list(prefix):
                yield replace(info, path=f"models/o--gguf/{COMMIT}/../../../q.gguf")

    store = Hostile(uuid4().hex)
    await store.put(f"models/o--gguf/{COMMIT}/q.gguf", b"", content_type="application/octet-stream")
    with pytest.raises(UnsafePath, match="not a safe name"):
        await fetch.fetch(PINNED, replace(sources, mirror=Mirror(store)))
    assert not list(sources.cache.parent.rglob("q.gguf"))


async def test_there_must_be_a_mirror_to_push_to(sources: Sources) -> None:
    with pytest.raises(WeightsError, match="no mirror"):
        await fetch.push_to_mirror([PINNED], sources)


async def test_pin_records_what_came_and_reports_what_could_not_be_looked_up(
    hub: HubServer, sources: Sources, tmp_path: Path
) -> None:
    missing = VARIANT.model_copy(update={"repo": "o/absent"})
    pinned = await fetch.pin([VARIANT, missing], sources)
    assert set(pinned.lock.repos) == {GGUF, BASE}
    assert set(pinned.missing) == {"o/absent"}
    assert "o/absent" in pinned.missing["o/absent"]
    assert pinned.lock.repos[BASE].revision == COMMIT
    assert set(pinned.lock.repos[BASE].files) == PAINTING | TEXT
    assert pinned.lock.repos[GGUF].files["q.gguf"].size == len(hub.repos[GGUF].files["q.gguf"])

    path = tmp_path / "weights.lock.json"
    lock.write(path, pinned.lock)
    assert json.loads(path.read_text())["repos"][GGUF]["revision"] == COMMIT
    settings = WeightsSettings(cache=tmp_path / "fresh", lock=path)
    later = replace(Sources.of(settings, Secrets()), endpoint=hub.url)
    assert later.locked == pinned.lock
    assert (await fetch.fetch(VARIANT, later)).transformer.parent.name == COMMIT


async def test_pin_finds_a_newer_commit_and_keeps_other_repositories(hub: HubServer, sources: Sources) -> None:
    old = lock.LockedRepo(revision="a" * 40, files={"q.gguf": lock.LockedFile(size=1, sha256="0" * 64)})
    locked = lock.Lock(repos={GGUF: old, "o/other": old})
    pinned = await fetch.pin([VARIANT], replace(sources, locked=locked))
    assert pinned.lock.repos[GGUF].revision == COMMIT
    assert pinned.lock.repos["o/other"] == old


async def test_what_differs_from_the_lock_is_refused(hub: HubServer, sources: Sources) -> None:
    pinned = await fetch.pin([VARIANT], sources)
    (sources.cache / "o--gguf" / COMMIT / "q.gguf").unlink()
    (sources.cache / "o--gguf" / COMMIT / ".q.gguf.verified").unlink(missing_ok=True)
    sound = hub.repos[GGUF].files["q.gguf"]
    hub.repos[GGUF].files["q.gguf"] = sound[:-1] + bytes([sound[-1] ^ 1])
    with pytest.raises(CorruptWeights, match="SHA-256"):
        await fetch.fetch(VARIANT, replace(sources, locked=pinned.lock))


async def test_what_came_is_hashed_once_and_never_again(hub: HubServer, sources: Sources, tmp_path: Path) -> None:
    with recorded() as pinning:
        pinned = await fetch.pin([VARIANT], sources)
    sizes = sum(file.size for repo in pinned.lock.repos.values() for file in repo.files.values())
    assert {name: part.bytes for name, part in pinning.items()} == {"fetch": sizes, "verify": sizes}
    fresh = replace(sources, cache=tmp_path / "fresh", locked=pinned.lock)
    with recorded() as first:
        await fetch.pull([VARIANT], fresh)
    assert {name: part.bytes for name, part in first.items()} == {"fetch": sizes, "verify": sizes}
    with recorded() as later:
        await fetch.pull([VARIANT], fresh)
    assert later == {}


async def test_pinning_again_hashes_nothing_twice(hub: HubServer, sources: Sources) -> None:
    once = (await fetch.pin([VARIANT], sources)).lock
    with recorded() as parts:
        again = await fetch.pin([VARIANT], replace(sources, locked=once))
    assert again.lock == once
    assert parts["verify"].bytes == sum(file.size for repo in once.repos.values() for file in repo.files.values())


@pytest.fixture
def verified(tmp_path: Path) -> tuple[Path, lock.LockedFile]:
    """A file that was found good."""
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    lock.verify(path, locked := lock.describe(path))
    return path, locked


def hashed_bytes(path: Path, locked: lock.LockedFile) -> int:
    """How much `verify` hashes now, whatever it says."""
    with recorded() as parts, suppress(CorruptWeights):
        lock.verify(path, locked)
    return parts["verify"].bytes if parts else 0


def test_a_file_that_was_found_good_is_not_hashed_again(verified: tuple[Path, lock.LockedFile]) -> None:
    assert hashed_bytes(*verified) == 0


def other_time(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def other_inode(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.rename(path)


def damaged_note(path: Path) -> None:
    path.with_name(".file.verified").write_bytes(b"\xff\x00")


def no_note(path: Path) -> None:
    path.with_name(".file.verified").unlink()


@pytest.mark.parametrize("change", [other_time, other_inode, damaged_note, no_note])
def test_a_file_is_hashed_again_where_its_note_does_not_fit_it(
    verified: tuple[Path, lock.LockedFile], change: Callable[[Path], None]
) -> None:
    change(verified[0])
    assert hashed_bytes(*verified) == 7
    assert hashed_bytes(*verified) == 0


def test_good_weights_are_good_where_no_note_can_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    (tmp_path / ".file.verified").mkdir()
    locked = lock.describe(path)
    assert hashed_bytes(path, locked) == 7
    assert hashed_bytes(path, locked) == 7
    assert {vars(record)["action"] for record in caplog.records} == {"hash_not_cached"}


def test_changed_content_is_found(verified: tuple[Path, lock.LockedFile]) -> None:
    path, locked = verified
    written_ns = path.stat().st_mtime_ns
    path.write_bytes(b"Weights")
    os.utime(path, ns=(0, written_ns + 1))
    with pytest.raises(CorruptWeights, match="SHA-256"):
        lock.verify(path, locked)
    assert hashed_bytes(path, locked) == 7


def test_a_note_vouches_for_no_other_hash_than_the_locks(verified: tuple[Path, lock.LockedFile]) -> None:
    path, locked = verified
    with pytest.raises(CorruptWeights, match="SHA-256"):
        lock.verify(path, locked.model_copy(update={"sha256": "0" * 64}))
    assert hashed_bytes(path, locked) == 0


def test_a_file_of_another_size_is_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    with pytest.raises(CorruptWeights, match=r"file has 7 bytes, but the lock file says 8"):
        lock.verify(path, lock.LockedFile(size=8, sha256="0" * 64))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ('{"format": 2}', "format: Input should be 1"),
        ('{"repos": {"o/r": {"revision": "main", "files": {}}}}', r"repos\.o/r\.revision"),
        ('{"repo": {}}', "repo: Extra inputs"),
    ],
)
def test_a_lock_file_that_is_none(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "weights.lock.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=rf"weights\.lock\.json is not a weights lock file: .*{reason}"):
        lock.read(path)


def test_no_lock_file_is_an_empty_lock(tmp_path: Path) -> None:
    assert lock.read(tmp_path / "absent.json") == lock.Lock()
