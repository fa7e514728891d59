"""Pure: which worker gets a request. No I/O, no clock (time is an argument), no network library."""
