"""Long runs on real data; each writes the record of its chapter into `cln_tutorial/results/`."""
