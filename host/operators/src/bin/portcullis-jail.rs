//! The launcher as a program of its own: what `portcullis __jail` does, without the rest of the product.

use std::process::ExitCode;

fn main() -> ExitCode {
    portcullis_operators::jail::main(std::env::args_os().skip(1))
}
