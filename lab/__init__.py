"""The laboratory: what trains, shows, judges and measures. It imports `lib_dynfuse`, never the other way."""
