//! Says to the core that it is built with loom.
fn main() {
    println!("cargo::rustc-cfg=loom");
}
