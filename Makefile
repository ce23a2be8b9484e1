# make demo: quantize the shipped network. make test: run all tests. Both set up libtorch first, see scripts/libtorch.sh;
# with LIBTORCH_DEVICE=cuda one that runs on GPUs too.
.PHONY: demo test build libtorch clean

demo: build
	target/release/tsquant quantize configs/mnist_resnet.yaml

# Tests run side by side: each has one of libtorch's threads.
test: libtorch
	OMP_NUM_THREADS=1 cargo test --locked

build: libtorch
	cargo build --release --locked

export LIBTORCH_DEVICE

libtorch:
	scripts/libtorch.sh

clean:
	cargo clean
	rm -rf .libtorch .libtorch.partial runs
