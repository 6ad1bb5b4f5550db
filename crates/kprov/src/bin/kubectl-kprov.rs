//! `kubectl kprov ...`: kprov by the name under which kubectl finds plugins. It uses the cluster that kubectl does.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    // The program lies beside this one, or in PATH.
    let beside = std::env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name("kprov"))
        .filter(|path| path.is_file());
    let program = beside.unwrap_or_else(|| "kprov".into());
    let error = Command::new(&program)
        .arg0("kubectl-kprov")
        .args(std::env::args_os().skip(1))
        .exec();
    let _ = writeln!(
        std::io::stderr(),
        "error: can't run `{}`: {error}\n\nhint: put `kprov` beside `kubectl-kprov`",
        program.display()
    );
    ExitCode::from(2)
}
