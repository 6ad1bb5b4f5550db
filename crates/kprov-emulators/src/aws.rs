//! EC2 and its load balancers: a proxy in front of a `moto` server.
