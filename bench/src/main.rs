//! (purpose to be written)
fn main() {}
