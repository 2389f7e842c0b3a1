"""What the commands of `tensorwright` do, a file for each group; `cli.py` has their options."""
