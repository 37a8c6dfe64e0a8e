# make iterate   set up what is missing, then run full rounds: finetune, fuse, evaluate
# make experiment EXPERIMENT=FILE.toml   full rounds under several settings, and their curves side by side
# make test      set up what is missing, then run the tests
.SUFFIXES:
.PHONY: iterate experiment publish test test-scale test-faults fuzz mutate test-peers test-tensorflow test-oldest lint format reference bench bench-finetune bench-evaluate assets setup clean help

PYTHON = python3
ITERATIONS = 1
JOBS = 2
CONFIG = configs/demo.toml
RUN = runs/demo
# Contributors drawn per iteration, by seed; empty: as CONFIG says; 0: all.
SAMPLE =
# GATE=1 keeps the last good base model when a fused model is surely worse than its own base.
GATE =
# A private key that signs the contributions, for a CONFIG whose [fuse] names trusted_keys.
SIGN_KEY =
# What `make experiment` compares.
EXPERIMENT = configs/experiments/contributors.toml
# Where `make publish` writes, and what it publishes.
TO = runs/published
MODEL = $(RUN)
# Its licence, if CONFIG's [publish] names none.
LICENSE =

venv = .venv
bin = $(venv)/bin
ready = $(venv)/ready
demo = assets/demo/assets.json

# The demo's assets are fetched only for the configs that use them.
iterate: $(ready) $(if $(filter configs/demo.toml configs/smoke.toml,$(CONFIG)),$(demo))
	@PATH="$(CURDIR)/$(bin):$$PATH" RUN="$(RUN)" CONFIG="$(CONFIG)" ITERATIONS="$(ITERATIONS)" JOBS="$(JOBS)" \
		SAMPLE="$(SAMPLE)" GATE="$(GATE)" SIGN_KEY="$(SIGN_KEY)" sh scripts/iterate.sh

publish: $(ready)
	@evaluation=$$($(bin)/coldctl status "$(RUN)" --evaluation) && \
	$(bin)/coldctl publish "$(MODEL)" --config "$(CONFIG)" --to "$(TO)" --evaluation "$$evaluation" \
		$(if $(LICENSE),--license "$(LICENSE)")

# Which of several settings is better: one run per variant, then their curves side by side.
experiment: $(ready) $(demo)
	@PATH="$(CURDIR)/$(bin):$$PATH" python scripts/experiment.py "$(EXPERIMENT)" --jobs "$(JOBS)" \
		--to "$(if $(filter file,$(origin TO)),runs/$(basename $(notdir $(EXPERIMENT))),$(TO))"

# Side by side, a test file at a time; what no test reaches is printed, and less than 95 % of lines and branches is a failure.
test: $(ready)
	$(bin)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
		--cov --cov-report term-missing:skip-covered --cov-report json:.coverage.json
	@$(bin)/python scripts/covered.py .coverage.json

# A Ray cluster of several nodes, one of them killed; a thousand contributors.
test-scale: $(ready)
	$(bin)/python -m pytest --durations=5 tests/scale

# What takes long: a round killed at 200 moments, 500 flipped bits, every stage on full and read-only disks.
test-faults: $(ready)
	FAULTS=all $(bin)/python -m pytest -s tests/faults tests/artifacts/test_disk_faults.py tests/artifacts/test_corruption.py

# Every parser of strangers' bytes on 100,000 inputs, by atheris where it can be had. FUZZ="--only parquet --inputs 1000" for less.
fuzz: $(ready)
	@$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,fuzz]' || \
		echo "no atheris here: inputs come from the project's own mutations"
	$(bin)/python scripts/fuzz.py $(FUZZ)

# The code broken on purpose, one place at a time: does a test notice? Into docs/mutation.md.
mutate: $(ready)
	$(bin)/python scripts/mutate.py

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

format: $(ready)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

# docs/reference.md and the types of the Python API, from the settings classes; the table of docs/fusing.md, from the
# registry of methods.
reference: $(ready)
	$(bin)/python scripts/reference.py docs/reference.md
	$(bin)/python scripts/api_stub.py
	$(bin)/python scripts/method_table.py docs/fusing.md

bench: $(ready)
	$(bin)/python benchmarks/fuse.py $(BENCH)

bench-finetune: $(ready) $(demo)
	$(bin)/python benchmarks/finetune.py $(BENCH)

bench-evaluate: $(ready) $(demo) .venv-peers/ready
	$(bin)/python benchmarks/evaluate.py $(BENCH)

# What other tools compute on the same inputs, in an environment of its own: they want other versions than we do.
test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest tests/peers

.venv-peers/ready: pyproject.toml constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt \
		mergekit flwr pytest hypothesis matplotlib ml-dtypes msgspec platformdirs scikit-learn tomli-w universal-pathlib
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . # flwr holds typer back
	@touch $@

# The oldest versions that pyproject.toml admits, in an environment of its own.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest tests/commands/test_pipeline.py tests/data/test_data.py tests/artifacts/test_signatures.py -k "not store"

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[data,lora,onnx,s3,sign]' pytest hypothesis jsonschema
	@touch $@

# The card's TensorFlow block and the tokenizers of transformers 4, whose last TensorFlow classes want older versions than we do.
test-tensorflow: $(ready) $(demo) .venv-tensorflow/ready
	TENSORFLOW_PYTHON="$(CURDIR)/.venv-tensorflow/bin/python" $(bin)/python -m pytest tests/with_tensorflow -rA --show-capture=stdout

.venv-tensorflow/ready: constraints-tensorflow.txt
	$(PYTHON) -m venv .venv-tensorflow
	.venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-tensorflow.txt \
		transformers tensorflow-cpu tf-keras
	@touch $@

assets: $(demo)

setup: $(ready)

$(demo): scripts/demo_assets.py | $(ready)
	@$(bin)/python scripts/demo_assets.py --to assets/demo
	@touch $(demo)

# Constraints pin what is installed here; the ranges in pyproject.toml stay open for others.
$(ready): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "coldctl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(ready)

clean:
	rm -rf $(venv) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
