# make          install everything into .venv; does nothing when it is up to date
# make demo     pretrain and evaluate on drawn images; needs no data, no network and no GPU
# make test     run the tests
# make lint     check the style
# make doctor   show what works on this machine, and the commands that fix what does not
# make clean    remove what these commands made, with .venv but not runs/
#
# make PYTHON=python3.12        use another Python (3.10 to 3.14)
# make demo ARGS="--data DIR"   pass arguments; likewise make test ARGS="-k queue"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# one more than cores: many tests wait for processes that they start
TEST_PROCESSES ?= $(shell expr $$(nproc || echo 2) + 1)

.PHONY: all demo test lint doctor clean help
.ONESHELL:
.SHELLFLAGS := -euc

all: $(INSTALLED)
	@:

demo: $(INSTALLED)
	@$(BIN)/fastssl demo $(ARGS)

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --maxprocesses 8 --dist worksteal tests $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

doctor: $(INSTALLED)
	@$(BIN)/fastssl doctor $(ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

$(INSTALLED): setup.py Makefile
	@say() { echo "fastssl: $$*"; }
	python=$(PYTHON)
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then python=$(BIN)/python; fi
	version() { $$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
	check_python() {
	    case "$$(version)" in
	        3.10|3.11|3.12|3.13|3.14) ;;
	        "") say "cannot run $$python: install Python 3.10 to 3.14, or name one with make PYTHON=python3.12"; exit 1;;
	        *) say "$$python is $$(version), but 3.10 to 3.14 is needed: name one with make PYTHON=python3.12"; exit 1;;
	    esac
	}
	! command -v $$python >/dev/null || check_python

	# FFCV's build needs pkg-config, libturbojpeg and OpenCV 4; FFCV and torch.compile need a C++ compiler and
	# Python.h; Debian's python3 comes without venv. Only Python and venv are indispensable.
	missing=
	need() { missing="$$missing $$1"; }
	if command -v $$python >/dev/null; then
	    $$python -c 'import ensurepip, venv' 2>/dev/null || need python$$(version)-venv
	    $$python -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null \
	        || need python$$(version)-dev
	else
	    need python3; need python3-venv; need python3-dev
	fi
	command -v c++ >/dev/null || need g++
	command -v pkg-config >/dev/null || need pkg-config
	pkg-config --exists libturbojpeg 2>/dev/null || need libturbojpeg0-dev
	pkg-config --exists opencv4 2>/dev/null || need libopencv-dev
	if [ -n "$$missing" ]; then
	    if [ "$$(id -u)" = 0 ]; then root=; elif [ -t 0 ]; then root=sudo; else root="sudo -n"; fi
	    apt() { $$root env DEBIAN_FRONTEND=noninteractive apt-get -qq "$$@" >/dev/null; }
	    failed=$$missing
	    if command -v apt-get >/dev/null && { [ -z "$$root" ] || command -v sudo >/dev/null; }; then
	        say "installing system packages:$$missing"
	        failed=
	        apt update || true
	        for package in $$missing; do
	            apt install -y --no-install-recommends $$package || failed="$$failed $$package"
	        done
	    fi
	    if ! command -v apt-get >/dev/null; then
	        say "continuing without some packages, here by Debian's names:$$failed; make doctor says what to install"
	    elif [ -n "$$failed" ]; then
	        say "continuing without some packages; for all features: sudo apt-get install$$failed && make -B"
	    fi
	fi

	check_python
	if [ $$python != $(BIN)/python ] && ! $$python -m venv --clear $(VENV) >/dev/null; then
	    rm -rf $(VENV)
	    say "$$python cannot create a virtual environment; try sudo apt-get install python$$(version)-venv"
	    exit 1
	fi

	log=$(VENV)/pip.log
	pip() { $(BIN)/python -m pip --disable-pip-version-check install "$$@" >>$$log 2>&1; }
	say "installing PyTorch and the rest into $(VENV): about 7 GB, a few minutes"
	pip --upgrade pip || true
	pip --editable '.[test]' || { tail -n 20 $$log; say "pip failed; its whole output is in $$log"; exit 1; }
	for extra in dali ffcv; do  # optional: the download or the build may fail
	    pip --editable ".[$$extra]" || say "continuing without $$extra ($$log says why, make doctor how to fix it)"
	done
	touch $@
