"""Speed, peak memory and error of the fused loss beside its peers, in one interleaved run."""
