//! The Azure provider: machines, network and disks through Azure Resource Manager.
