//! Azure Resource Manager, for the resource types that kprov uses.
