"""What makes a CPU fast; a GPU needs none of it. Each is put in place at one line of a workload."""
