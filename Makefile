# Everything a fresh clone needs: a virtual environment of its own, then the command. PYTHON and TORCH may be set.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,umt5]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/autorefiner generate --model random-tiny --frames 81 --size 128x128 --prompt "random weights" \
		--out outputs/demo.mp4 --sheet outputs/demo.png
	$(BIN)/autorefiner inspect outputs/demo.mp4

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info outputs
