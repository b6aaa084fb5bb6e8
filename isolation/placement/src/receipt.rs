//! The receipt: every term, what the kernel says about it, and one verdict.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{Reason, Refusal, TermName};

/// The judgement over all terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything asked for is in force.
    Aligned,
    /// Something asked for is not in force; the request allowed that.
    Degraded,
    /// Something asked for is not in force, and the request was strict.
    Violated,
    /// Nothing was asked for.
    Unasked,
}

/// One guarantee and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// Which.
    pub name: TermName,
    /// What was asked; `None` when the state is given for information only.
    pub asked: Option<String>,
    /// Whether it holds now.
    pub in_force: bool,
    /// What was read, by file or figure, unedited where possible.
    pub evidence: BTreeMap<String, String>,
    /// Why it does not hold, for machines.
    pub code: Option<Reason>,
    /// Why it does not hold, for people.
    pub reason: Option<String>,
}

impl Term {
    /// A term that is in force until something is found against it.
    #[must_use]
    pub fn new(name: TermName, asked: Option<String>) -> Self {
        let evidence = BTreeMap::new();
        Self { name, asked, in_force: true, evidence, code: None, reason: None }
    }

    /// Records that the term does not hold. The first cause gives the code; all are listed.
    pub fn fail(&mut self, code: Reason, reason: impl Into<String>) {
        self.in_force = false;
        self.code.get_or_insert(code);
        match &mut self.reason {
            Some(reasons) => {
                reasons.push_str("; ");
                reasons.push_str(&reason.into());
            }
            None => self.reason = Some(reason.into()),
        }
    }

    /// Adds evidence.
    pub fn note(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.evidence.insert(key.into(), value.into());
    }

    /// The refusal that a strict container gets for this term; `None` while it is in force
    /// or was not asked for.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        if self.in_force || self.asked.is_none() {
            return None;
        }
        let reason = self.code.unwrap_or(Reason::Unreadable);
        Some(Refusal::new(self.name, reason, self.reason.clone().unwrap_or_default()))
    }
}

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The judgement.
    pub verdict: Verdict,
    /// The kernel the container runs on.
    pub kernel: String,
    /// When the kernel was asked, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// The terms, in a fixed order.
    pub terms: Vec<Term>,
}

impl Receipt {
    /// Judges the terms.
    #[must_use]
    pub fn new(kernel: &str, strict: bool, terms: Vec<Term>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let taken_unix_ms = now.map_or(0, |since| since.as_millis() as u64);
        let verdict = judge(strict, &terms);
        Self { verdict, kernel: kernel.to_owned(), taken_unix_ms, terms }
    }

    /// The term of this name.
    #[must_use]
    pub fn term(&self, name: TermName) -> Option<&Term> {
        self.terms.iter().find(|term| term.name == name)
    }

    /// Takes in a term that was audited elsewhere, and judges anew.
    pub fn include(&mut self, strict: bool, term: Term) {
        self.terms.push(term);
        self.verdict = judge(strict, &self.terms);
    }

    /// Says that a term was asked for, if the audit did not know, and judges anew.
    pub fn want(&mut self, strict: bool, name: TermName, asked: &str) {
        if let Some(term) = self.terms.iter_mut().find(|term| term.name == name) {
            term.asked.get_or_insert_with(|| asked.to_owned());
        }
        self.verdict = judge(strict, &self.terms);
    }

    /// Adds what was found out elsewhere (a plan's shortfall, a failed proof) and judges anew.
    pub fn add(&mut self, strict: bool, refusal: &Refusal) {
        if let Some(term) = self.terms.iter_mut().find(|term| term.name == refusal.term) {
            term.asked.get_or_insert_with(|| "yes".to_owned());
            // The plan knows the cause, the audit saw the effect: the cause comes first.
            let seen = term.reason.take().unwrap_or_default();
            let effect = seen.strip_prefix(refusal.detail.as_str()).unwrap_or(&seen);
            let effect = effect.trim_start_matches("; ");
            term.code = None;
            term.fail(refusal.reason, &refusal.detail);
            if !effect.is_empty() {
                term.fail(refusal.reason, effect);
            }
        }
        self.verdict = judge(strict, &self.terms);
    }

    /// For a terminal: a line per term, then its reason and evidence.
    #[must_use]
    pub fn render(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Aligned => "aligned",
            Verdict::Degraded => "degraded",
            Verdict::Violated => "VIOLATED",
            Verdict::Unasked => "nothing asked",
        };
        let mut out = format!("verdict: {verdict} (kernel {})\n", self.kernel);
        for term in &self.terms {
            let (mark, state) = match (&term.asked, term.in_force) {
                (Some(_), true) => ('✓', "in force"),
                (Some(_), false) => ('✗', "not in force"),
                (None, true) => ('·', "not asked"),
                (None, false) => ('·', "not asked, not enforced"),
            };
            let asked = term.asked.as_deref().map(|asked| format!(": {asked}"));
            let name = term.name;
            let _infallible =
                writeln!(out, "{mark} {name:<15} {state}{}", asked.unwrap_or_default());
            if let Some(reason) = &term.reason {
                let _infallible = writeln!(out, "    because {reason}");
            }
            let width = term.evidence.keys().map(|key| key.chars().count()).max().unwrap_or(0);
            for (key, value) in &term.evidence {
                let value = if value.is_empty() { "(empty)" } else { value };
                let _infallible = writeln!(out, "    {key:<width$}  {value}");
            }
        }
        out
    }
}

fn judge(strict: bool, terms: &[Term]) -> Verdict {
    let mut asked = terms.iter().filter(|term| term.asked.is_some()).peekable();
    if asked.peek().is_none() {
        Verdict::Unasked
    } else if asked.all(|term| term.in_force) {
        Verdict::Aligned
    } else if strict {
        Verdict::Violated
    } else {
        Verdict::Degraded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Vec<Term> {
        let mut cpus = Term::new(TermName::ExclusiveCpus, Some("CPUs 2-3, isolated".to_owned()));
        cpus.note("cpuset.cpus.partition", "isolated");
        cpus.note("cpuset.cpus.isolated", "");
        let mut irq = Term::new(TermName::IrqQuiet, None);
        irq.fail(Reason::IrqsOnCpus, "2 interrupts are served on the CPUs");
        vec![cpus, irq]
    }

    #[test]
    fn what_was_not_asked_cannot_degrade() {
        assert_eq!(Receipt::new("6.12", true, terms()).verdict, Verdict::Aligned);
        assert_eq!(Receipt::new("6.12", true, vec![]).verdict, Verdict::Unasked);
        assert_eq!(Receipt::new("6.12", true, terms().split_off(1)).verdict, Verdict::Unasked);
    }

    #[test]
    fn what_was_wanted_and_is_not_there_degrades() {
        let mut receipt = Receipt::new("6.12", false, terms().split_off(1));
        receipt.want(false, TermName::IrqQuiet, "by annotation");
        assert_eq!(receipt.verdict, Verdict::Degraded);
        assert_eq!(receipt.terms[0].asked.as_deref(), Some("by annotation"));
    }

    #[test]
    fn a_missing_term_degrades_or_violates() {
        let mut lost = terms();
        lost[0].fail(Reason::PartitionInvalid, "the partition is gone");
        lost[0].fail(Reason::CpusShared, "9 tasks may run there");
        assert_eq!(lost[0].code, Some(Reason::PartitionInvalid));
        let refusal = lost[0].refusal().unwrap();
        assert_eq!(refusal.detail, "the partition is gone; 9 tasks may run there");
        assert_eq!(Receipt::new("6.12", false, lost.clone()).verdict, Verdict::Degraded);
        assert_eq!(Receipt::new("6.12", true, lost).verdict, Verdict::Violated);
    }

    #[test]
    fn the_cause_found_by_the_plan_comes_before_the_effect() {
        let mut receipt = Receipt::new("6.12", false, terms());
        receipt.terms[0].fail(Reason::CpusShared, "9 tasks may run there");
        let cause = Refusal::new(TermName::ExclusiveCpus, Reason::CgroupV1, "no partitions");
        receipt.add(false, &cause);
        let term = receipt.term(TermName::ExclusiveCpus).unwrap();
        assert_eq!(term.code, Some(Reason::CgroupV1));
        assert_eq!(term.reason.as_deref(), Some("no partitions; 9 tasks may run there"));
        assert_eq!(receipt.verdict, Verdict::Degraded);
    }

    #[test]
    fn the_text_shows_every_term_with_its_evidence() {
        let text = Receipt::new("6.12.95", true, terms()).render();
        let expected = "\
verdict: aligned (kernel 6.12.95)
✓ exclusive-cpus  in force: CPUs 2-3, isolated
    cpuset.cpus.isolated   (empty)
    cpuset.cpus.partition  isolated
· irq-quiet       not asked, not enforced
    because 2 interrupts are served on the CPUs
";
        assert_eq!(text, expected);
    }

    #[test]
    fn receipts_travel_as_json() {
        let receipt = Receipt::new("6.12.95", true, terms());
        let json = serde_json::to_string(&receipt).unwrap();
        assert!(json.contains(r#""verdict":"aligned""#) && json.contains(r#""name":"irq-quiet""#));
        assert_eq!(serde_json::from_str::<Receipt>(&json).unwrap(), receipt);
    }
}
