//! Man pages and shell completions of `pinion`, from the definition of its command line.
//! They are made here so that the program itself, which starts once per container, carries
//! neither generator.

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::error::{During, Result};

#[path = "../../runtime/cli/src/args.rs"]
#[allow(dead_code, reason = "only the definition is used here")]
mod pinion;

/// Where system administration commands are.
const SECTION: &str = "8";
/// Shell, the directory its completions are in below `share`, and the file's name there.
const COMPLETIONS: [(Shell, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", "pinion"),
    (Shell::Zsh, "zsh/site-functions", "_pinion"),
    (Shell::Fish, "fish/vendor_completions.d", "pinion.fish"),
];

/// Writes everything below `share`, as it lies in `/usr/local/share`.
pub(crate) fn write(share: &Path) -> Result<()> {
    let mut command = pinion::Cli::command();
    command.build();
    let manual = share.join("man").join(format!("man{SECTION}"));
    make_directory(&manual)?;
    write_pages(&command, "pinion", &manual)?;
    for (shell, directory, name) in COMPLETIONS {
        let directory = share.join(directory);
        make_directory(&directory)?;
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, "pinion", &mut script);
        write_file(&directory.join(name), &script)?;
    }
    Ok(())
}

/// One page per verb, and one for the whole.
fn write_pages(command: &Command, name: &str, directory: &Path) -> Result<()> {
    let page = Man::new(command.clone()).title(name).section(SECTION);
    let mut text = Vec::new();
    let path = directory.join(format!("{name}.{SECTION}"));
    page.render(&mut text).during(|| format!("render {name}"))?;
    write_file(&path, &text)?;
    let verbs = command.get_subcommands().filter(|verb| verb.get_name() != "help");
    verbs
        .filter(|verb| !verb.is_hide_set())
        .try_for_each(|verb| write_pages(verb, &format!("{name}-{}", verb.get_name()), directory))
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).during(|| format!("mkdir {}", path.display()))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).during(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_verb_has_a_page_and_every_shell_a_script() {
        let share = tempfile::tempdir().unwrap();
        super::write(share.path()).unwrap();
        let page = |name: &str| {
            let path = share.path().join(format!("man/man8/{name}.8"));
            std::fs::read_to_string(path).unwrap()
        };
        assert!(page("pinion").contains("pinion\\-checkpoint(8)"));
        assert!(page("pinion-checkpoint").contains("manage\\-cgroups\\-mode"));
        assert!(page("pinion-exec").contains("ignore\\-paused"));
        for script in [
            "bash-completion/completions/pinion",
            "zsh/site-functions/_pinion",
            "fish/vendor_completions.d/pinion.fish",
        ] {
            let text = std::fs::read_to_string(share.path().join(script)).unwrap();
            assert!(text.contains("checkpoint"), "{script}");
        }
    }
}
