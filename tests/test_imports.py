"""Who may import whom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def loaded_by(module: str) -> set[str]:
    """The top-level packages in a process that has imported `module`."""
    script = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout))


def test_the_contracts_are_kept() -> None:
    # In a process of its own, because the linter switches other modules' loggers off.
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_app_and_the_command_line_run_without_the_diffusion_extra() -> None:
    blocked = ["torch", "diffusers", "transformers", "accelerate", "gguf", "safetensors", "huggingface_hub"]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import deployments.app, deployments.cli, deployments.config
from pathlib import Path
assert deployments.config.check(Path("serve_config.yaml")) == []
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_rays_environment_is_made_without_loading_ray() -> None:
    """Ray reads it when it is first imported."""
    assert "ray" not in loaded_by("deployments.own_ray")


@pytest.mark.slow
def test_the_worker_loads_neither_ray_nor_torch_nor_a_vendors_package() -> None:
    loaded = loaded_by("serve_app.jobs.worker")
    assert not loaded & {"ray", "torch", "diffusers", "transformers", "google", "grpc", "sqlalchemy", "fastapi"}


@pytest.mark.slow
def test_the_adapters_load_a_vendors_package_only_when_asked() -> None:
    assert not loaded_by("serve_app.adapters") & {"google", "grpc", "sqlalchemy", "ray", "torch"}
    assert "sqlalchemy" in loaded_by("serve_app.adapters.stores.sql"), "or the test above proves nothing"


@pytest.mark.slow
def test_the_routes_load_neither_ray_nor_torch() -> None:
    assert not loaded_by("serve_app.http.app") & {"ray", "torch", "google", "grpc", "sqlalchemy"}
