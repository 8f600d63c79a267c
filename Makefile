# make demo     search, retrain, test and draw on the digits set: a few minutes, nothing but the packages to download
# make test     the test suite
# make sanitize the C++ under AddressSanitizer and UndefinedBehaviorSanitizer (GCC; about half an hour)
# make races    the C++ with four threads under ThreadSanitizer (GCC, on Linux)
# make torture  random kills, damaged checkpoints, random command lines, after `make sanitize` and `make races`
# make lint     style checks
# make clean    remove the environment (runs/ stays)

SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
DIGITS := --dataset digits --save demo

.PHONY: demo test sanitize races torture lint clean

demo: .venv/installed
	@set -e -o pipefail; newest() { ls -td runs/$$1-demo-* | head -n 1; }; \
	echo "search, retrain, test and draw on 8x8 digits: two to five minutes on two cores, by what else they do"; \
	echo "== 1/4 search (second order)"; \
	$(BIN)/python train_search.py --unrolled $(DIGITS) --epochs 3 --layers 3 --init_channels 8; \
	search=$$(newest search); \
	echo "== 2/4 retrain $$search"; \
	$(BIN)/python train.py $(DIGITS) --arch $$search --epochs 15 --layers 5 --init_channels 16 --batch_size 64; \
	train=$$(newest train); \
	echo "== 3/4 test $$train"; \
	$(BIN)/python test.py --model_path $$train | tee $$train/test.txt; \
	echo "== 4/4 draw $$search"; \
	if command -v dot > /dev/null; then \
		$(BIN)/python visualize.py $$search --output $$search/figures; \
	else \
		echo "no dot program: install Graphviz to have the cells drawn (their .gv sources are in $$search/figures)"; \
	fi; \
	echo; echo "genotype:  $$(grep -o 'Genotype(.*' $$search/log.txt | tail -n 1)"; \
	echo "accuracy:  $$(grep -o 'test loss .*' $$train/test.txt)"; \
	echo "pages:     $$search/report.html, $$train/report.html"

test: .venv/installed
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# a library of its own, built with the sanitizers, whose runtime must be there before Python
sanitize: .venv/installed
	CXX="g++ -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" INVOLUTION_CACHE=.venv/sanitized \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q -p no:cacheprovider \
	tests/test_involution.py tests/test_fast_cell.py tests/test_model.py tests/test_inference.py tests/test_recorded.py \
	-k "not compile and not export and not start_at_once and not out_of_memory"

# its threads are those of tests/openmp_of_pthreads.cpp; a race ends the tests with a report and exit code 66
races: .venv/installed
	CXX="g++ -O1 -g -fsanitize=thread -Wl,-Bsymbolic $(CURDIR)/tests/openmp_of_pthreads.cpp" \
	INVOLUTION_CACHE=.venv/races LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" \
	TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" OMP_NUM_THREADS=1 \
	setarch -R $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/test_involution.py tests/test_fast_cell.py \
	tests/test_model.py tests/test_inference.py tests/test_recorded.py \
	-k "not compile and not export and not start_at_once and not out_of_memory"

torture: .venv/installed
	$(MAKE) sanitize
	$(MAKE) races
	$(BIN)/python benchmarks/torture.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@echo "making the environment .venv (PyTorch takes a few minutes to install)"
	@$(PYTHON) -m venv .venv
	@trap 'kill $$pulse' EXIT; \
	while sleep 25 > /dev/null 2>&1; do echo "installing: $$(du -sm .venv | cut -f1) MB so far"; done & pulse=$$!; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv
