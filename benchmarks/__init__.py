"""What ra_lens costs, measured: ratios against a named peer, in one process, interleaved."""
