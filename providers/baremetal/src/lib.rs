//! Bare metal: hosts that are there already, named by an inventory.
//!
//! Start reading at [`inventory`].

pub mod inventory;
