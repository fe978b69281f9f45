"""The command line: ``aspo fit | validate | test | plan | configs | export | report``."""

import os

# Before torch and tokenizers are imported: the reward processes are forked off a process with threads otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
