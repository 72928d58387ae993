//! Writes the seeds: `seeds DIRECTORY`.

fn main() -> std::io::Result<()> {
    let directory =
        std::env::args_os().nth(1).ok_or_else(|| std::io::Error::other("a directory is expected"))?;
    fuzz::seeds::write(std::path::Path::new(&directory))
}
