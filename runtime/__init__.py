"""What a script and its run stand on, whatever they compute.

threads.py     how threads wait for each other; imported before PyTorch
memory.py      what is freed stays with the process, and gradients where they are
settings.py    the flags of a run, and the rules for what is kept of them
checkpoint.py  files of tensors and plain values: written whole, verified, kept twice
processes.py   several processes that work as one
schedule.py    learning rate and image size of an epoch
progress.py    a word where a long step would be silent
"""
