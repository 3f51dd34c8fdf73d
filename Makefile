# Everything a fresh machine needs is installed by the first target that wants it: Python 3.11 is enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A Ray of one's own: token authentication, and nothing but loopback.
RAY := RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 OMP_WAIT_POLICY=PASSIVE

.PHONY: install web demo audit run test test-fast check fix lock licences sbom advisories image-test bench bench-gpu chaos mutants clean
.PHONY: up down logs status inspect-env gpu-cdi-generate gpu-test

install: $(INSTALLED) web

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

VENDOR := serve_app/web/vendor

web: $(VENDOR)/konva.min.js  ## what the workbench's page needs of npm's packages, without which it says that it is not built

$(VENDOR)/konva.min.js: package.json package-lock.json
	@{ npm ci --ignore-scripts --no-audit --no-fund && npm run --silent vendor; } || \
	  echo "GET / will say that the workbench is not built: that takes npm (apt-get install npm) and its registry, then make web" >&2

demo: install  ## edit a photo with two engines through the whole app; pictures in out/demo
	$(BIN)/fluxfill demo

audit: install  ## four tiny variants at five guidance scales, by a Ray job against the app; the report in out/audit
	$(BIN)/fluxfill audit demo

run: install  ## serve on this machine, and open the workbench; `fluxfill submit` from a second terminal
	$(BIN)/python scripts/open_page.py http://127.0.0.1:8000/ & umask 077; $(RAY) $(BIN)/serve run serve_config.yaml

# Whatever needs Ray runs in one worker, with one Ray, and what compiles in one, too.
test: install  ## every test
	$(BIN)/pytest -n 2 --dist loadgroup $(if $(CI),--durations=25)

# Torch and diffusers take longer to import than most tests to run.
WITH_TORCH := $(wildcard tests/test_engine_*.py) $(addprefix tests/test_,repack.py benchmark_engine.py compile_cache.py \
  audit_compiling.py prompts.py tiny.py)

test-fast: install  ## no Ray, no servers, no torch
	$(BIN)/pytest -n 2 -m "not serve and not emulator and not slow" $(WITH_TORCH:%=--ignore=%)

check: install  ## formatting, lint, types, who may import whom, the configs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck scripts/*.sh container/*.sh .ci/run
	$(BIN)/fluxfill check serve_config.yaml
	$(BIN)/fluxfill check container/serve_config.yaml
	$(BIN)/fluxfill check compose/serve_config.yaml
	$(BIN)/fluxfill check compose/serve_config.gpu.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.cloudbuild cloudbuild.yaml

fix: install  ## format and mend what can be mended by machine
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One Python, one kind of machine: the image's.
LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
  --annotation-style line --custom-compile-command 'make lock'
IMAGE_EXTRAS := $(addprefix --extra ,diffusion google s3 postgresql heif traces audit)

lock: install  ## the image's requirements, in constraints.txt's versions; UV_FIND_LINKS: a folder that has torch's CPU wheel
	sed 's/+cpu$$//' constraints.txt > requirements/cuda.constraints
	$(LOCK) $(IMAGE_EXTRAS) -c constraints.txt $(if $(UV_FIND_LINKS),,--torch-backend=cpu) pyproject.toml -o requirements/cpu.txt
	UV_FIND_LINKS= $(LOCK) $(IMAGE_EXTRAS) -c requirements/cuda.constraints pyproject.toml -o requirements/cuda.txt
	UV_FIND_LINKS= $(LOCK) -c requirements/cuda.constraints --group image -o requirements/build.txt
	rm requirements/cuda.constraints

# Of the image; the packages of both builds.
PACKAGES := sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements/cpu.txt

licences: install  ## the licences of the packages that the image brings, as Markdown; CUDA's own wheels aside
	@$(BIN)/pip-licenses --order=license --format=markdown --packages $$($(PACKAGES))

sbom: install  ## a bill of materials of what requirements/ locks: CycloneDX, in out/sbom; the image has one of its own
	mkdir -p out/sbom
	for torch in cpu cuda; do PYTHONWARNINGS=ignore $(BIN)/uv run --quiet --isolated --no-project --python $(BIN)/python \
	  --with-requirements requirements/build.txt cyclonedx-py requirements --output-reproducible --pyproject pyproject.toml \
	  -o out/sbom/$$torch.cdx.json requirements/$$torch.txt || exit 1; done

# PyPI's torch, of which there are advisories; the CPU build has no package beside cuda.txt's.
advisories: install  ## known vulnerabilities of the image's packages, by pip-audit; wants a network, and says where there is none
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/advisories.sh requirements/cuda.txt

image-test:  ## build the image and try it, as root on Debian 12; logs and the bill of materials in out/image
	scripts/image_test.sh

bench: install  ## measure; figures into benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.serving --out benchmarks/results/serving.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.engine --out benchmarks/results/engine.json --chart benchmarks/results/engine.png

bench-gpu: install  ## the engine at full size on a GPU of 24 GB or more, nothing downloaded; 40 GB of host memory, 25 of disk
	mkdir -p benchmarks/results
	set -e; for packing in Q8_0 Q4_0 Q5_K_S; do \
	  $(BIN)/python -m benchmarks.engine --double 19 --single 38 --device cuda --threads $$(nproc) --steps 28 --runs 3 --packing $$packing \
	    --out benchmarks/results/engine-gpu-$$packing.json --chart benchmarks/results/engine-gpu-$$packing.png; done

chaos: install  ## 500 sessions while replicas are killed and the stores are cut off; figures and logs into out/chaos
	mkdir -p out/chaos
	$(BIN)/python -m benchmarks.chaos --logs out/chaos --out out/chaos/chaos.json

# What is mutated: FILES, or all. A mutant is called `serve_app.jobs.lease.xǁLeaseǁ_renew__mutmut_3`; `mutmut show` prints it.
MUTATED := $(if $(FILES),$(subst /,.,$(FILES:.py=.)),serve_app.)

mutants: install  ## faults in the code that no test notices; hours, or with FILES=serve_app/jobs/lease.py one file
	$(BIN)/mutmut run $(MUTATED:%='%*')
	@$(BIN)/mutmut results | grep -F $(MUTATED:%=-e %) | \
	  awk '/: (survived|no tests|suspicious)$$/ { print; n++ } END { print n + 0, "mutants survived" }'

# Containers; DEV.md has the rest. Docker's Compose, or `make up COMPOSE=podman-compose`, which knows no CDI.
COMPOSE ?= docker compose
CDI_FOLDERS ?= /etc/cdi /var/run/cdi
# The profile: gpu where a CDI spec describes NVIDIA's GPUs.
PROFILE ?= $(if $(shell grep -rls nvidia.com/gpu $(CDI_FOLDERS)),gpu,cpu)

up: .env  ## the service with its stores, broker, Prometheus and Grafana in containers; PROFILE=cpu|gpu
	@if [ "$(PROFILE) $(origin PROFILE)" = "cpu file" ] && nvidia-smi >/dev/null 2>&1; then \
	  echo "There is a GPU, but no CDI spec describes it to containers: make gpu-cdi-generate, or make up PROFILE=cpu" >&2; exit 1; fi
	$(COMPOSE) --profile $(PROFILE) up --build --detach
	@echo "GET http://127.0.0.1:8080/ready says when it serves: make status, make logs"

.env:
	umask 077; while IFS= read -r line; do case $$line in \
	  *=random*) echo "$${line%%random*}$$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')$${line#*random}" ;; \
	  *) echo "$$line" ;; esac; \
	done <compose/.env.example >$@

down:  ## stop the containers; their volumes stay
	$(COMPOSE) --profile cpu --profile gpu down

logs:  ## of the containers, as they come
	$(COMPOSE) --profile cpu --profile gpu logs --follow --tail 100

status:  ## the containers, and what GET /ready says
	$(COMPOSE) --profile cpu --profile gpu ps --all
	@curl -s --noproxy '*' http://127.0.0.1:8080/ready || echo "http://127.0.0.1:8080/ready does not answer"

inspect-env:  ## what this machine has: driver, GPUs, Docker, CDI, Python, torch and what CUDA it sees
	@scripts/inspect_env.sh

gpu-cdi-generate:  ## describe this machine's GPUs to containers: /etc/cdi/nvidia.yaml
	@command -v nvidia-ctk >/dev/null || { echo "nvidia-ctk is missing: install NVIDIA's container toolkit" >&2; exit 1; }
	$(if $(filter-out 0,$(shell id -u)),sudo) nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml
	nvidia-ctk cdi list

gpu-test: .env  ## whether a container sees the GPU, and torch in it
	$(COMPOSE) --profile gpu run --build --rm --no-deps app-gpu bash -c \
	  'nvidia-smi --list-gpus && python -c "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())"'

clean:  ## everything that is not in git
	rm -rf $(VENV) node_modules $(VENDOR) out var build mutants *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
