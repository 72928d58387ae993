//! Reports for people.

use std::fmt;

use crate::token::{PlatformClaims, RealmClaims};
use crate::verify::{Outcome, Report, lifecycle_name};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            match check.outcome {
                Outcome::Passed => writeln!(f, "  ok      {}", check.name)?,
                Outcome::NotChecked => {
                    writeln!(f, "  -       {}: not checked ({})", check.name, check.expected)?
                }
                Outcome::Failed => {
                    writeln!(f, "  FAILED  {}", check.name)?;
                    writeln!(f, "            expected {}", check.expected)?;
                    writeln!(f, "            found    {}", check.found)?;
                }
            }
        }
        if let Some(realm) = &self.realm {
            realm_lines(f, realm)?;
        }
        if let Some(platform) = &self.platform {
            platform_lines(f, platform)?;
        }
        if self.development_root {
            writeln!(
                f,
                "note: the platform token is signed by the development root, whose private key is public:"
            )?;
            writeln!(f, "      it proves nothing about a real machine")?;
        }
        match self.failures().count() {
            0 => write!(f, "verified"),
            _ => {
                let names: Vec<&str> = self.failures().map(|check| check.name).collect();
                write!(f, "NOT verified: {}", names.join(", "))
            }
        }
    }
}

/// Bytes as text if they are one, else as hexadecimal digits; zeroes at the end are left out.
fn readable(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    match std::str::from_utf8(&bytes[..end]) {
        Ok("") => "zeroes".into(),
        Ok(text) if text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) => format!("{text:?}"),
        _ => crate::text::hex(bytes),
    }
}

fn realm_lines(f: &mut fmt::Formatter<'_>, claims: &RealmClaims) -> fmt::Result {
    writeln!(f, "Realm")?;
    writeln!(f, "  initial measurement      {}", claims.initial_measurement)?;
    for (n, rem) in claims.extensible_measurements.iter().enumerate() {
        let rem = if rem.0.iter().all(|byte| *byte == 0) { "not extended".into() } else { rem.to_string() };
        writeln!(f, "  extensible measurement {n} {rem}")?;
    }
    writeln!(f, "  hash algorithm           {}", claims.hash_algorithm)?;
    writeln!(f, "  personalization value    {}", readable(&claims.personalization_value.0))?;
    writeln!(f, "  challenge                {}", readable(&claims.challenge.0))
}

fn platform_lines(f: &mut fmt::Formatter<'_>, claims: &PlatformClaims) -> fmt::Result {
    writeln!(f, "Platform")?;
    writeln!(f, "  implementation id        {}", claims.implementation_id)?;
    writeln!(f, "  instance id              {}", claims.instance_id)?;
    writeln!(
        f,
        "  life cycle               {:#06x} ({})",
        claims.lifecycle,
        lifecycle_name(claims.lifecycle)
    )?;
    writeln!(f, "  configuration            {}", readable(&claims.config.0))?;
    for software in &claims.software {
        let name = software.name.as_deref().unwrap_or("(no type)");
        let version = software.version.as_deref().unwrap_or("");
        writeln!(f, "  software                 {} {name} {version}", software.measurement)?;
    }
    Ok(())
}
