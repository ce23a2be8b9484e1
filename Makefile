# make demo: quantize the shipped network. make test: run all tests. Both set up libtorch first, see scripts/libtorch.sh.
.PHONY: demo test build libtorch clean

demo: build
	target/release/tsquant quantize configs/mnist_resnet.yaml

test: libtorch
	cargo test --locked

build: libtorch
	cargo build --release --locked

libtorch:
	scripts/libtorch.sh

clean:
	cargo clean
	rm -rf .libtorch .libtorch.partial runs
