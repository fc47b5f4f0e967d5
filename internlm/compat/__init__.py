"""The only place that touches private or version-dependent names of torch (2.11 to 2.13): a function for each."""
