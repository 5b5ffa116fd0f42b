"""Speed and memory beside the peers; each writes `cln_tutorial/results/NAME.benchmark.json`."""
