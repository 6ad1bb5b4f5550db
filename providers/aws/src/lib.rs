//! The AWS provider: machines, network and disks on Amazon EC2.
