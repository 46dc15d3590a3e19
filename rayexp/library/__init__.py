"""What `import rayexp` offers to Python programs. A call does what the command of its name does, as a guest of the
program that makes it: nothing of the process is left changed (`rayexp/library/guest.py`)."""
