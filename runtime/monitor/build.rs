//! Links without tables for unwinding where the build says that nothing unwinds.

include!("../aborting.rs");
