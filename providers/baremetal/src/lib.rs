//! The bare-metal provider: hosts that are there already, by SSH or by their BMC.
