# What a developer types; CI calls the same targets (.ci/run).
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help test soak bench lint tools

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: tools ## every test, on SQLite and on PostgreSQL
	$(CARGO) test --locked

soak: tools ## the long forms: more kills, larger tables
	SOAK=1 $(CARGO) test --locked --test durability
	SOAK=1 $(CARGO) test --locked --test mail
	SOAK=1 $(CARGO) test --locked --test jobs installation

bench: tools ## our figures beside their references; ONLY=purge for one section, QUICK=1 for a try
	PG_FSYNC=on $(CARGO) bench --locked --bench figures -- $(ONLY)

lint: ## format, clippy and documentation, warnings as errors
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --no-deps --locked

tools: ## what the tests need: PostgreSQL, Python, strace, systemd-analyze
	tests/support/install.sh
