//! Compiles the pause program, which the crate carries as bytes.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=pause/pause.c");
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("pause");
    // The compiler for the target, without the flags that `cc` adds for libraries.
    let compiler = cc::Build::new().opt_level_str("s").cargo_metadata(false).get_compiler();
    let status = Command::new(compiler.path())
        .args(["-static", "-nostdlib", "-ffreestanding", "-Os", "-fno-pie", "-no-pie"])
        .args([
            "-fno-stack-protector",
            "-fno-asynchronous-unwind-tables",
            "-Wall",
            "-Werror",
        ])
        .args(["-s", "-Wl,--build-id=none", "-o"])
        .arg(&out)
        .arg("pause/pause.c")
        .status()?;
    if !status.success() {
        return Err(format!(
            "`{}` did not compile pause/pause.c: {status}",
            compiler.path().display()
        )
        .into());
    }
    Ok(())
}
