//! From a tree to a value.
//!
//! `&&`, `||` and the macros made of them are decided by the value that decides, whatever fails beside it; all else fails with
//! its first part that fails.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::function::no_overload;
use super::syntax::{Macro, MacroKind, Node, Operator};
use super::value::{Key, Value, whole};
use super::{Failed, Steps};
use crate::property::{self, Attributes};

pub(super) fn evaluate<'a>(node: &'a Node, within: Attributes<'a>, steps: &Steps) -> Result<Value<'a>, Failed> {
    Evaluation { within, steps }.value(node, None)
}

struct Evaluation<'a, 's> {
    within: Attributes<'a>,
    steps: &'s Steps,
}

/// A macro's variable, and those around it.
struct Scope<'o, 'a> {
    name: &'o str,
    value: &'o Value<'a>,
    outer: Option<&'o Scope<'o, 'a>>,
}

type Outcome<'a> = Result<Value<'a>, Failed>;

impl<'a> Evaluation<'a, '_> {
    fn value(&self, node: &'a Node, scope: Option<&Scope<'_, 'a>>) -> Outcome<'a> {
        self.steps.take(1)?;
        Ok(match node {
            Node::Null => Value::Null,
            Node::Bool(truth) => Value::Bool(*truth),
            Node::Int(number) => Value::Int(*number),
            Node::Uint(number) => Value::Uint(*number),
            Node::Double(number) => Value::Double(*number),
            Node::Text(text) => Value::Text(Cow::Borrowed(text)),
            Node::Bytes(bytes) => Value::Bytes(Cow::Borrowed(bytes)),
            Node::Name { name, absolute } => return self.name(name, if *absolute { None } else { scope }),
            Node::Field(of, name) => {
                let of = self.value(of, scope)?;
                return self.field(&of, name)?.ok_or_else(|| Failed(format!("there is no field `{name}`").into()));
            }
            Node::Has(of, name) => {
                let of = self.value(of, scope)?;
                return self.has(&of, name).map(Value::Bool);
            }
            Node::Index(parts) => {
                let [of, index] = &**parts;
                let of = self.value(of, scope)?;
                return self.index(&of, &self.value(index, scope)?);
            }
            Node::List(items) => {
                let items = items.iter().map(|item| self.value(item, scope)).collect::<Result<_, _>>()?;
                return Value::list(items);
            }
            Node::Map(entries) => return self.map(entries, scope),
            Node::Not(operand) => match self.value(operand, scope)? {
                Value::Bool(truth) => Value::Bool(!truth),
                _ => return Err(no_overload()),
            },
            Node::Negative(operand) => match self.value(operand, scope)? {
                Value::Int(number) => Value::Int(number.checked_neg().ok_or(OVERFLOW)?),
                Value::Double(number) => Value::Double(-number),
                _ => return Err(no_overload()),
            },
            Node::Binary(operator, operands) => {
                let [left, right] = &**operands;
                let left = self.value(left, scope)?;
                let right = self.value(right, scope)?;
                return self.binary(*operator, left, right);
            }
            Node::Logic { decides, operands } => {
                return decide(*decides, operands.iter().map(|operand| self.value(operand, scope)));
            }
            Node::Conditional(parts) => {
                let [condition, yes, no] = &**parts;
                match self.value(condition, scope)? {
                    Value::Bool(true) => return self.value(yes, scope),
                    Value::Bool(false) => return self.value(no, scope),
                    _ => return Err(no_overload()),
                }
            }
            Node::Call(function, arguments) => {
                let arguments = arguments.iter().map(|argument| self.value(argument, scope));
                return function.call(arguments.collect::<Result<_, _>>()?, self.steps);
            }
            Node::Macro(node) => return self.go_through(node, scope),
        })
    }

    fn name(&self, name: &str, mut scope: Option<&Scope<'_, 'a>>) -> Outcome<'a> {
        while let Some(inner) = scope {
            if inner.name == name {
                return inner.value.copy(self.steps);
            }
            scope = inner.outer;
        }
        let found = self.within.top(name.as_bytes()).map(Value::from).or_else(|| Value::type_by_name(name));
        found.ok_or_else(|| Failed(format!("there is no `{name}` here").into()))
    }

    fn field(&self, of: &Value<'a>, name: &'a str) -> Result<Option<Value<'a>>, Failed> {
        if let Value::Message(message) = of {
            return Ok(self.within.field(&property::Value::Message(*message), name.as_bytes()).map(Value::from));
        }
        of.get(&Value::Text(Cow::Borrowed(name.as_bytes())), &self.within, self.steps)
    }

    /// Whether a map has the key, or a message something in the field.
    fn has(&self, of: &Value<'a>, name: &'a str) -> Result<bool, Failed> {
        let found = self.field(of, name)?;
        if !matches!(of, Value::Message(_)) {
            return Ok(found.is_some());
        }
        Ok(match found.ok_or(Failed::new("the message has no such field"))? {
            Value::Text(text) => !text.is_empty(),
            // They are empty here.
            Value::Attributes(_) | Value::Message(_) => false,
            _ => true,
        })
    }

    fn index(&self, of: &Value<'a>, index: &Value<'a>) -> Outcome<'a> {
        let Value::List(items, _) = of else {
            return of.get(index, &self.within, self.steps)?.ok_or(Failed::new("the map has no such key"));
        };
        let at = match index {
            Value::Int(number) => usize::try_from(*number).ok(),
            Value::Uint(number) => usize::try_from(*number).ok(),
            Value::Double(number) => whole(*number).and_then(|number| usize::try_from(number).ok()),
            _ => return Err(no_overload()),
        };
        at.and_then(|at| items.get(at)).ok_or(Failed::new("the list has no such index"))?.copy(self.steps)
    }

    fn map(&self, entries: &'a [[Node; 2]], scope: Option<&Scope<'_, 'a>>) -> Outcome<'a> {
        let mut map = BTreeMap::new();
        for [key, value] in entries {
            let key = match self.value(key, scope)? {
                Value::Bool(truth) => Key::Bool(truth),
                Value::Int(number) => Key::Int(number),
                Value::Uint(number) => Key::Uint(number),
                Value::Text(text) => Key::Text(text),
                _ => return Err(Failed::new("a value of this type cannot be a map's key")),
            };
            if map.insert(key, self.value(value, scope)?).is_some() {
                return Err(Failed::new("a map has the same key twice"));
            }
        }
        Value::map(map)
    }

    fn binary(&self, operator: Operator, left: Value<'a>, right: Value<'a>) -> Outcome<'a> {
        let steps = self.steps;
        Ok(Value::Bool(match operator {
            Operator::Equal => left.equals(&right, &self.within, steps)?,
            Operator::NotEqual => !left.equals(&right, &self.within, steps)?,
            Operator::In => match &right {
                Value::List(items, _) => {
                    for item in items.iter() {
                        if left.equals(item, &self.within, steps)? {
                            return Ok(Value::Bool(true));
                        }
                    }
                    false
                }
                map => map.get(&left, &self.within, steps)?.is_some(),
            },
            Operator::Less | Operator::LessOrEqual | Operator::Greater | Operator::GreaterOrEqual => {
                let order = left.order(&right, steps)?.ok_or_else(no_overload)?;
                order.is_some_and(|order| match operator {
                    Operator::Less => order.is_lt(),
                    Operator::LessOrEqual => order.is_le(),
                    Operator::Greater => order.is_gt(),
                    _ => order.is_ge(),
                })
            }
            Operator::Add | Operator::Subtract | Operator::Multiply | Operator::Divide | Operator::Remainder => {
                return arithmetic(operator, left, right, steps);
            }
        }))
    }

    fn go_through(&self, node: &'a Macro, outer: Option<&Scope<'_, 'a>>) -> Outcome<'a> {
        let items = self.value(&node.over, outer)?.items(self.steps)?;
        let at =
            |node: &'a Node, value: &Value<'a>, name: &'a str| self.value(node, Some(&Scope { name, value, outer }));
        let holds = |node: &'a Node, value: &Value<'a>, name: &'a str| match at(node, value, name)? {
            Value::Bool(truth) => Ok(truth),
            _ => Err(no_overload()),
        };
        let (name, step) = (node.variable.as_str(), &node.step);
        match node.kind {
            MacroKind::All | MacroKind::Exists => {
                decide(node.kind == MacroKind::Exists, items.iter().map(|item| at(step, item, name)))
            }
            MacroKind::ExistsOne => {
                let mut count = 0;
                for item in items.iter() {
                    count += usize::from(holds(step, item, name)?);
                }
                Ok(Value::Bool(count == 1))
            }
            MacroKind::Map | MacroKind::Filter => {
                let mut values = Vec::new();
                for item in items.iter() {
                    self.steps.take(1)?;
                    let condition = if node.kind == MacroKind::Filter { Some(step) } else { node.condition.as_ref() };
                    if let Some(condition) = condition
                        && !holds(condition, item, name)?
                    {
                        continue;
                    }
                    values.push(if node.kind == MacroKind::Filter {
                        item.copy(self.steps)?
                    } else {
                        at(step, item, name)?
                    });
                }
                Value::list(values)
            }
        }
    }
}

const OVERFLOW: Failed = Failed(Cow::Borrowed("a number becomes too large, or less than possible"));

/// Goes through truths until one decides. Where none does, the first that failed is what it comes to.
fn decide<'a>(decides: bool, truths: impl Iterator<Item = Outcome<'a>>) -> Outcome<'a> {
    let mut failure = None;
    for truth in truths {
        match truth {
            Ok(Value::Bool(truth)) if truth == decides => return Ok(Value::Bool(decides)),
            Ok(Value::Bool(_)) => {}
            Ok(_) => failure = failure.or_else(|| Some(no_overload())),
            Err(failed) => failure = failure.or(Some(failed)),
        }
    }
    failure.map_or(Ok(Value::Bool(!decides)), Err)
}

fn arithmetic<'a>(operator: Operator, left: Value<'a>, right: Value<'a>, steps: &Steps) -> Outcome<'a> {
    use Operator::{Add, Divide, Multiply, Remainder, Subtract};
    let zero = || Failed::new("a number is divided by zero");
    Ok(match (left, right) {
        (Value::Int(left), Value::Int(right)) => Value::Int(
            match operator {
                Add => left.checked_add(right),
                Subtract => left.checked_sub(right),
                Multiply => left.checked_mul(right),
                _ if right == 0 => return Err(zero()),
                Divide => left.checked_div(right),
                _ => left.checked_rem(right),
            }
            .ok_or(OVERFLOW)?,
        ),
        (Value::Uint(left), Value::Uint(right)) => Value::Uint(
            match operator {
                Add => left.checked_add(right),
                Subtract => left.checked_sub(right),
                Multiply => left.checked_mul(right),
                _ if right == 0 => return Err(zero()),
                Divide => left.checked_div(right),
                _ => left.checked_rem(right),
            }
            .ok_or(OVERFLOW)?,
        ),
        (Value::Double(left), Value::Double(right)) => Value::Double(match operator {
            Add => left + right,
            Subtract => left - right,
            Multiply => left * right,
            Divide => left / right,
            Remainder => return Err(no_overload()),
            _ => return Err(no_overload()),
        }),
        (Value::Text(left), Value::Text(right)) if operator == Add => Value::Text(joined(&left, &right, steps)?),
        (Value::Bytes(left), Value::Bytes(right)) if operator == Add => Value::Bytes(joined(&left, &right, steps)?),
        (Value::List(left, _), Value::List(right, _)) if operator == Add => {
            steps.take(left.len() + right.len())?;
            let items = left.iter().chain(right.iter()).map(|item| item.copy(steps));
            return Value::list(items.collect::<Result<_, _>>()?);
        }
        (Value::Timestamp(at), Value::Duration(long)) | (Value::Duration(long), Value::Timestamp(at))
            if operator == Add =>
        {
            Value::Timestamp(at.saturating_add(long))
        }
        (Value::Timestamp(at), Value::Duration(long)) if operator == Subtract => {
            Value::Timestamp(at.saturating_sub(long))
        }
        (Value::Timestamp(left), Value::Timestamp(right)) if operator == Subtract => {
            Value::Duration(left.saturating_sub(right))
        }
        (Value::Duration(left), Value::Duration(right)) => Value::Duration(match operator {
            Add => left.saturating_add(right),
            Subtract => left.saturating_sub(right),
            _ => return Err(no_overload()),
        }),
        _ => return Err(no_overload()),
    })
}

fn joined<'a>(left: &[u8], right: &[u8], steps: &Steps) -> Result<Cow<'a, [u8]>, Failed> {
    steps.take_bytes(left.len() + right.len())?;
    Ok([left, right].concat().into())
}
