"""What is wrong, and what to do about it: the checks behind `status` and `check`."""
