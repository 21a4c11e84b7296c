"""How good a model is, with and without its adapter: public benchmarks, its own held-out data, MT-Bench."""
