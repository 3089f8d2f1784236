"""The local page of `forgetfilter review`, which shows one row at a time and stores verdicts."""
