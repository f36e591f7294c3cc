# Everything a fresh clone needs: a virtual environment of its own, then the command. PYTHON and TORCH may be set.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTHON_FLOOR ?= $(shell command -v python3.10 || echo $(PYTHON))
TORCH_FLOOR ?= torch==2.7.1
VENV := .venv
FLOOR := .venv-floor
BIN := $(VENV)/bin

.PHONY: demo test test-floor kill fuzz soak lint locales density pictures workflows thumbnails clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,train,umt5]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/autorefiner demo show --out outputs

# Two at a time with a thread each, a file's tests in one process: what they share is made once.
test: $(VENV)/ready
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The tests on the oldest torch that the package promises, and on Python 3.10 where it is installed: a large download,
# into an environment of its own.
test-floor: $(FLOOR)/ready
	OMP_NUM_THREADS=1 $(FLOOR)/bin/pytest -n 2 --dist loadfile

$(FLOOR)/ready: pyproject.toml
	$(PYTHON_FLOOR) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check "$(TORCH_FLOOR)"
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check -e ".[test,train,umt5]"
	touch $@

# Kills runs at random moments and checks that nothing finished is lost; at most 20 minutes on two cores.
kill: $(VENV)/ready
	$(BIN)/python tests/kill_campaign.py

# Hostile files, workflows, arguments and requests, each in a process of its own; at most 12 minutes on two cores.
fuzz: $(VENV)/ready
	$(BIN)/python tests/fuzz_campaign.py

# Queues 200 watched runs in a real ComfyUI (COMFYUI_PATH) and checks that its memory stays flat; about 10 minutes.
soak: $(VENV)/ready
	$(BIN)/python tests/soak_campaign.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# locales/en from what the nodes say; the other languages are kept by hand.
locales: $(VENV)/ready
	$(BIN)/python -m autorefiner.nodes.locales

density:
	$(PYTHON) benchmarks/density.py

pictures: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[page]"
	$(BIN)/python tests/page_pictures.py

# workflows/NAME.json from workflows/api/ and tests/workflow_layouts.py, drawn with the page's sizes of nodes.
workflows: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[page]"
	$(BIN)/python tests/workflow_pages.py

thumbnails: $(VENV)/ready
	$(BIN)/python tests/thumbnails.py

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info outputs
