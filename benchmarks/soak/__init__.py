"""Two vLLM servers, a Redis and disks, while all of them fail at random."""
